// Word n-grams read from ARPA text: the numbers and errors of ngram.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace ctc {

constexpr uint32_t kNone = UINT32_MAX;

inline uint64_t mixed(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

// The number of an edge's target, by the number of its source and the edge's label.
class Edges {
 public:
  uint32_t find(uint32_t source, uint32_t label) const {
    if (keys_.empty()) return kNone;
    const size_t slot = slot_of(key(source, label));
    return keys_[slot] ? targets_[slot] : kNone;
  }

  // The target; `target` if there was no such edge.
  uint32_t insert(uint32_t source, uint32_t label, uint32_t target) {
    if (3 * (size_ + 1) > 2 * keys_.size()) rehash(keys_.empty() ? 16 : 2 * keys_.size());
    const size_t slot = slot_of(key(source, label));
    if (keys_[slot]) return targets_[slot];
    keys_[slot] = key(source, label);
    ++size_;
    return targets_[slot] = target;
  }

 private:
  // Never 0, which marks a free slot.
  static uint64_t key(uint32_t source, uint32_t label) {
    return (uint64_t(source) + 1) << 32 | label;
  }

  size_t slot_of(uint64_t key) const {
    const size_t mask = keys_.size() - 1;
    size_t slot = mixed(key) & mask;
    while (keys_[slot] && keys_[slot] != key) slot = (slot + 1) & mask;
    return slot;
  }

  void rehash(size_t slots) {
    std::vector<uint64_t> keys(slots);
    std::vector<uint32_t> targets(slots);
    keys_.swap(keys);
    targets_.swap(targets);
    for (size_t i = 0; i < keys.size(); ++i) {
      if (!keys[i]) continue;
      const size_t slot = slot_of(keys[i]);
      keys_[slot] = keys[i];
      targets_[slot] = targets[i];
    }
  }

  std::vector<uint64_t> keys_;
  std::vector<uint32_t> targets_;
  size_t size_ = 0;
};

// Reads characters of UTF-8, which Python has written.
inline uint32_t next_character(std::string_view text, size_t& at) {
  const unsigned char first = text[at++];
  const int more = first < 0xc0 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
  uint32_t character = more ? first & (0x3f >> more) : first;
  for (int i = 0; i < more && at < text.size(); ++i) {
    character = character << 6 | (static_cast<unsigned char>(text[at++]) & 0x3f);
  }
  return character;
}

// N-grams form a tree, first word first. The state of a text is the node of its longest end that is
// in the tree; `suffix` leads to the node of all words but the first, or but more of them.
class Ngram {
 public:
  static constexpr uint32_t kRoot = 0;
  static constexpr uint32_t kUnknown = 0;

  Ngram() {
    add_node(kNone, kNone, 0);
    add_word("<unk>");
    nodes_[node_of_word(kUnknown)].log_prob = -100;
    word_of_.push_back(kUnknown);
  }

  // A block of the file; false where it is damaged, and `error` says how.
  bool read(std::string_view block) {
    while (!done_) {
      const size_t end = block.find('\n');
      rest_.append(block.substr(0, end));
      if (end == std::string_view::npos) return true;
      block.remove_prefix(end + 1);
      ++line_number_;
      if (!read_line(stripped(rest_))) return false;
      rest_.clear();
    }
    return true;
  }

  // After the last block.
  bool finish() {
    if (!done_ && !rest_.empty() && !read("\n")) return false;
    if (!done_) return fail(section_ < 0 ? "it has no \\data\\" : "it ends before \\end\\");
    link();
    return true;
  }

  const std::string& error() const { return error_; }
  int order() const { return static_cast<int>(counts_.size()); }
  size_t num_words() const { return words_.size() - 1; }

  // kUnknown where the model does not know it.
  uint32_t word(const std::string& spelling) const {
    const auto found = words_.find(spelling);
    return found == words_.end() ? kUnknown : found->second;
  }

  uint32_t start(bool in_sentence) const {
    const uint32_t mark = word("<s>");
    return in_sentence && mark != kUnknown ? node_of_word(mark) : kRoot;
  }

  // log10 p(word | state); `state` becomes the one after it.
  double score(uint32_t& state, uint32_t word) const {
    double log_backoff = 0;
    uint32_t after = kNone;
    for (uint32_t node = state;; node = nodes_[node].suffix) {
      const uint32_t child = this->child(node, word);
      if (child != kNone) {
        if (after == kNone) after = child;
        if (!std::isnan(nodes_[child].log_prob)) {
          state = after;
          return log_backoff + nodes_[child].log_prob;
        }
      }
      log_backoff += nodes_[node].log_backoff;
    }
  }

  // The tree of the known words' characters: kNone where no word begins so.
  uint32_t spelled(uint32_t letters, uint32_t character) const {
    return letters == kNone ? kNone : letters_.find(letters, character);
  }

  // The word that ends in a node of that tree, or kUnknown.
  uint32_t word_at(uint32_t letters) const {
    return letters == kNone ? kUnknown : word_of_[letters];
  }

 private:
  struct Node {
    float log_prob;  // NaN: a context that the file leaves out
    float log_backoff;
    uint32_t suffix;
  };
  struct Place {
    uint32_t parent;
    uint32_t word;
    int length;
  };

  static uint32_t node_of_word(uint32_t word) { return word + 1; }

  uint32_t child(uint32_t node, uint32_t word) const {
    return node == kRoot ? node_of_word(word) : children_.find(node, word);
  }

  bool fail(std::string error) {
    error_ = std::move(error);
    return false;
  }

  bool fail_at_line(const std::string& is_what, std::string_view line) {
    return fail("line " + std::to_string(line_number_) + is_what + std::string(line.substr(0, 80)));
  }

  static bool is_space(char c) { return c == ' ' || ('\t' <= c && c <= '\r'); }

  static std::string_view stripped(std::string_view text) {
    while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
    while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
    return text;
  }

  bool read_line(std::string_view line) {
    if (section_ < 0) {
      if (line == "\\data\\") section_ = 0;
      return true;
    }
    if (line.empty()) return true;
    if (line.front() == '\\') return end_section(line);
    if (section_ == 0) return read_count(line);
    if (!read_ngram(line)) {
      return fail_at_line(" is no " + std::to_string(section_) + "-gram: ", line);
    }
    ++entries_;
    return true;
  }

  bool end_section(std::string_view line) {
    if (section_ > 0 && entries_ != counts_[section_ - 1]) {
      return fail("it has " + std::to_string(entries_) + " " + std::to_string(section_) +
                  "-grams and announces " + std::to_string(counts_[section_ - 1]));
    }
    ++section_;
    entries_ = 0;
    if (section_ > order()) {
      done_ = order() > 0 && line == "\\end\\";
      return done_ || fail_at_line(" is ", line);
    }
    return line == "\\" + std::to_string(section_) + "-grams:" || fail_at_line(" is ", line);
  }

  bool read_count(std::string_view line) {
    int length = 0, read = 0;
    long long count = 0;
    const std::string text(line);
    const int found = std::sscanf(text.c_str(), "ngram %d = %lld%n", &length, &count, &read);
    if (found != 2 || size_t(read) != text.size() || length != order() + 1 || count < 0) {
      return fail_at_line(" is ", line);
    }
    counts_.push_back(count);
    return true;
  }

  bool read_ngram(std::string_view line) {
    fields_.clear();
    while (!line.empty()) {
      size_t end = 0;
      while (end < line.size() && !is_space(line[end])) ++end;
      fields_.emplace_back(line.substr(0, end));
      line = stripped(line.substr(end));
    }
    const size_t length = section_;
    if (fields_.size() < length + 1 || fields_.size() > length + 2) return false;
    Node values{0, 0, kRoot};
    if (!number(fields_[0], values.log_prob)) return false;
    if (fields_.size() == length + 2 && !number(fields_[length + 1], values.log_backoff)) {
      return false;
    }
    // Nothing is longer, so nothing backs off from it.
    if (section_ == order()) values.log_backoff = 0;
    const uint32_t node = length == 1 ? node_of_word(add_word(fields_[1])) : path(length);
    if (node == kRoot) return false;
    nodes_[node] = values;
    return true;
  }

  static bool number(const std::string& text, float& value) {
    char* end;
    value = static_cast<float>(std::strtod(text.c_str(), &end));
    // What never comes, such as <s>; some programs write it so.
    if (std::isinf(value) && value < 0) value = -99;
    return *end == 0 && std::isfinite(value);
  }

  uint32_t add_word(const std::string& spelling) {
    if (spelling == "<UNK>" || (spelling == "<unk>" && !words_.empty())) return kUnknown;
    const uint32_t word = static_cast<uint32_t>(words_.size());
    const auto [place, is_new] = words_.emplace(spelling, word);
    if (!is_new) return place->second;
    add_node(kRoot, word, 1);
    if (word == kUnknown) return word;
    uint32_t letters = 0;
    for (size_t at = 0; at < spelling.size();) {
      const uint32_t next = static_cast<uint32_t>(word_of_.size());
      letters = letters_.insert(letters, next_character(spelling, at), next);
      if (letters == next) word_of_.push_back(kUnknown);
    }
    word_of_[letters] = word;
    return word;
  }

  // The node of the words in `fields_`, made with its contexts where it is not there; the root if
  // one of them was no 1-gram.
  uint32_t path(size_t length) {
    uint32_t node = kRoot;
    for (size_t i = 1; i <= length; ++i) {
      const auto found = words_.find(fields_[i] == "<UNK>" ? "<unk>" : fields_[i]);
      if (found == words_.end()) return kRoot;
      if (node == kRoot) {
        node = node_of_word(found->second);
        continue;
      }
      const uint32_t next = static_cast<uint32_t>(nodes_.size());
      const uint32_t child = children_.insert(node, found->second, next);
      if (child == next) add_node(node, found->second, static_cast<int>(i));
      node = child;
    }
    return node;
  }

  void add_node(uint32_t parent, uint32_t word, int length) {
    nodes_.push_back({std::nanf(""), 0, kRoot});
    places_.push_back({parent, word, length});
  }

  // Suffixes, from the short to the long: that of a node is the next in line of its parent's
  // suffixes that has a child for the last word.
  void link() {
    for (int length = 2; length <= order(); ++length) {
      for (size_t node = 0; node < nodes_.size(); ++node) {
        if (places_[node].length != length) continue;
        uint32_t shorter = nodes_[places_[node].parent].suffix, found;
        while ((found = child(shorter, places_[node].word)) == kNone) {
          shorter = nodes_[shorter].suffix;
        }
        nodes_[node].suffix = found;
      }
    }
    places_ = {};
  }

  std::unordered_map<std::string, uint32_t> words_;
  std::vector<Node> nodes_;  // the root, then single words, then longer ones
  std::vector<Place> places_;
  Edges children_;
  Edges letters_;
  std::vector<uint32_t> word_of_;

  std::string rest_, error_;
  std::vector<std::string> fields_;
  std::vector<long long> counts_;
  long long entries_ = 0;
  long line_number_ = 0;
  int section_ = -1;
  bool done_ = false;
};

}  // namespace ctc
