"""Raw corpora to manifests: listing, checking, downloading. No model code is imported here."""
