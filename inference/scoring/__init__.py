"""How well texts were recognised: error rates, how sure they are, and the files that hold them."""
