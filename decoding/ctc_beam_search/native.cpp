// The search of reference.py, for whole batches, behind a plain C interface.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "ngram.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Structures of native.py.
extern "C" {
struct Search {
  int64_t vocabulary, blank, beam_size, prune_history, score_boundary, topk, threads;
  double beam_prune_logp, token_prune_min_logp, hotword_token_min_logp, alpha, beta, unk_score_offset;
  const ctc::Ngram* ngram;        // or null
  const uint8_t* begins_word;     // (vocabulary)
  const int64_t* spelling_start;  // (vocabulary + 1)
  const uint32_t* spelling;       // characters
};

// The arrays of HotwordTree: edges of a state are sorted by symbol.
struct Hotwords {
  int32_t start;
  const int32_t* edges_start;  // (states + 1)
  const uint32_t* symbols;
  const int32_t* targets;
  const int32_t* failures;
  const double* gains;
  const double* advances;
};

struct Job {
  const void* state;  // the answer to an earlier job that wanted the state, or null
  int64_t state_bytes;
  const float* log_probs;  // (frames, vocabulary)
  int64_t frames;
  const Hotwords* hotwords;  // or null
  int64_t wanted;
  void* answer;
  int64_t answer_bytes;  // negative: out of memory
};

struct Token {
  int32_t id, start_frame, end_frame;
  float log_prob;
};
}

namespace {

using ctc::kNone;
using ctc::mixed;
using ctc::Ngram;

constexpr int64_t kState = 0, kFinal = 2;
constexpr uint32_t kWordEnd = 0;
constexpr double kLog10OfE = 0.4342944819032518;
constexpr int32_t kNowhere = -1;
// Texts and emissions that no beam has any more are given up when there are so many new ones.
constexpr size_t kSpare = 1 << 16;

// A text: the one before it and a character, or the end of a word.
struct Text {
  int32_t before, first_child, next_sibling;
  uint32_t symbol;
  int32_t word_start;  // the text in which the current word is still empty
  int32_t word_length;
  uint32_t letters;  // where the current word is in the n-gram's tree of characters
  uint32_t lm_state;
  int32_t hotword_state;
  int32_t slot;  // of this text's beam among the candidates of the token with number `visit`
  int64_t visit;
  uint64_t word;  // hash of the current word
  uint64_t late;  // hash of the words before it that the n-gram can see
  double lm, hotword_gain;
  double unfinished, finished;  // what n-gram and hotwords add while the text goes on, and at last
};

// A frame of a token in an alignment, and what was before it.
struct Emission {
  int32_t before, token, frame;
  int32_t repeats;
  float log_prob;
};

struct Beam {
  int32_t text, last_token, emission, repeats;
  double score, best, total;
};

double log_add(double a, double b) {
  return std::max(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
}

int32_t step(const Hotwords& tree, int32_t state, uint32_t symbol) {
  for (;; state = tree.failures[state]) {
    const uint32_t* first = tree.symbols + tree.edges_start[state];
    const uint32_t* last = tree.symbols + tree.edges_start[state + 1];
    const uint32_t* found = std::lower_bound(first, last, symbol);
    if (found != last && *found == symbol) return tree.targets[found - tree.symbols];
    if (state == 0) return 0;
  }
}

class Utterance {
 public:
  Utterance(const Search& search, const Job& job) : search_(search), job_(job) {
    if (job.state) {
      load();
    } else {
      start();
    }
  }

  void search() {
    for (int64_t i = 0; i < job_.frames; ++i, ++frame_) {
      advance(job_.log_probs + i * search_.vocabulary);
      if (texts_.size() > texts_limit_ || emissions_.size() > emissions_limit_) forget();
    }
  }

  std::vector<char> state() {
    forget();
    std::vector<char> bytes;
    const int64_t header[] = {frame_, int64_t(texts_.size()), int64_t(emissions_.size()),
                              int64_t(beams_.size())};
    append(bytes, header, 4);
    append(bytes, texts_.data(), texts_.size());
    append(bytes, emissions_.data(), emissions_.size());
    append(bytes, beams_.data(), beams_.size());
    return bytes;
  }

  std::vector<char> hypotheses(bool ended) {
    candidates_.clear();
    ++visit_;
    for (const Beam& beam : beams_) {
      Beam text = beam;
      if (ended) text.text = word_ended(beam.text);
      text.last_token = static_cast<int32_t>(search_.blank);
      offer(text);
    }
    prune(ended);
    const int64_t count = std::min<int64_t>(search_.topk, chosen_.size());
    std::vector<char> bytes;
    append(bytes, &count, 1);
    for (int64_t i = 0; i < count; ++i) {
      const Beam& beam = candidates_[chosen_[i]];
      const std::vector<Token> tokens = tokens_of(beam.emission);
      const double scores[] = {beam.score, beam.total};
      const int64_t length = tokens.size();
      append(bytes, scores, 2);
      append(bytes, &length, 1);
      append(bytes, tokens.data(), tokens.size());
    }
    return bytes;
  }

 private:
  template <class T>
  static void append(std::vector<char>& bytes, const T* values, size_t count) {
    const char* first = reinterpret_cast<const char*>(values);
    bytes.insert(bytes.end(), first, first + count * sizeof(T));
  }

  template <class T>
  static const char* take(const char* bytes, std::vector<T>& values, int64_t count) {
    values.resize(count);
    if (count) std::memcpy(values.data(), bytes, count * sizeof(T));
    return bytes + count * sizeof(T);
  }

  void start() {
    Text root{};
    root.before = root.first_child = root.next_sibling = kNowhere;
    root.lm_state = search_.ngram ? search_.ngram->start(search_.score_boundary) : 0;
    root.hotword_state = job_.hotwords ? job_.hotwords->start : 0;
    texts_.push_back(root);
    beams_.push_back({0, static_cast<int32_t>(search_.blank), kNowhere, 0, 0, 0, 0});
  }

  void load() {
    std::vector<int64_t> header;
    const char* bytes = take(static_cast<const char*>(job_.state), header, 4);
    frame_ = header[0];
    bytes = take(bytes, texts_, header[1]);
    bytes = take(bytes, emissions_, header[2]);
    take(bytes, beams_, header[3]);
    texts_limit_ += 2 * texts_.size();
    emissions_limit_ += 2 * emissions_.size();
  }

  void advance(const float* log_probs) {
    choose_tokens(log_probs);
    candidates_.clear();
    for (const int32_t token : tokens_) {
      ++visit_;
      for (const Beam& beam : beams_) {
        const Beam longer = extended(beam, token, log_probs[token]);
        if (is_likely(log_probs, token) || spells_hotword(longer)) offer(longer);
      }
    }
    prune(false);
    beams_.clear();
    late_.clear();
    for (const int32_t i : chosen_) {
      Beam beam = candidates_[i];
      if (search_.prune_history && !is_distinct(beam)) continue;
      if (beam.last_token != search_.blank) {
        emissions_.push_back({beam.emission, beam.last_token, static_cast<int32_t>(frame_),
                              beam.repeats, log_probs[beam.last_token]});
        beam.emission = static_cast<int32_t>(emissions_.size()) - 1;
      }
      beams_.push_back(beam);
    }
  }

  void choose_tokens(const float* log_probs) {
    double least = search_.token_prune_min_logp;
    if (job_.hotwords) least = std::min(least, search_.hotword_token_min_logp);
    const float* best = std::max_element(log_probs, log_probs + search_.vocabulary);
    best_token_ = static_cast<int32_t>(best - log_probs);
    tokens_.clear();
    for (int32_t token = 0; token < search_.vocabulary; ++token) {
      const bool is_kept = log_probs[token] > static_cast<float>(least);
      if (is_kept || token == best_token_) tokens_.push_back(token);
    }
  }

  bool is_likely(const float* log_probs, int32_t token) const {
    return token == best_token_ ||
           log_probs[token] > static_cast<float>(search_.token_prune_min_logp);
  }

  // Whether a hotword goes on or is finished; that a word begins is not enough.
  bool spells_hotword(const Beam& beam) const {
    const auto state = texts_[beam.text].hotword_state;
    return state != 0 && state != job_.hotwords->start;
  }

  Beam extended(Beam beam, int32_t token, double log_prob) {
    beam.repeats = token == beam.last_token;
    beam.last_token = token;
    beam.score += log_prob;
    beam.best += log_prob;
    if (token != search_.blank && !beam.repeats) {
      if (search_.begins_word[token]) beam.text = word_ended(beam.text);
      for (int64_t i = search_.spelling_start[token]; i < search_.spelling_start[token + 1]; ++i) {
        beam.text = child(beam.text, search_.spelling[i]);
      }
    }
    return beam;
  }

  // A candidate of the present visit; it is added to the one of its text.
  void offer(const Beam& beam) {
    Text& text = texts_[beam.text];
    if (text.visit != visit_) {
      text.visit = visit_;
      text.slot = static_cast<int32_t>(candidates_.size());
      candidates_.push_back(beam);
      return;
    }
    Beam& other = candidates_[text.slot];
    const double score = log_add(other.score, beam.score);
    if (beam.best > other.best) other = beam;
    other.score = score;
  }

  // Chooses the best candidates, in order; the earlier first where they are equal.
  void prune(bool ended) {
    double best = -INFINITY;
    for (Beam& beam : candidates_) {
      const Text& text = texts_[beam.text];
      beam.total = beam.score + (ended ? text.finished : text.unfinished);
      best = std::max(best, beam.total);
    }
    chosen_.clear();
    for (size_t i = 0; i < candidates_.size(); ++i) {
      if (candidates_[i].total >= best + search_.beam_prune_logp) {
        chosen_.push_back(static_cast<int32_t>(i));
      }
    }
    const size_t count = std::min<size_t>(chosen_.size(), search_.beam_size);
    std::partial_sort(chosen_.begin(), chosen_.begin() + count, chosen_.end(),
                      [this](int32_t a, int32_t b) {
                        const double difference = candidates_[a].total - candidates_[b].total;
                        return difference != 0 ? difference > 0 : a < b;
                      });
    chosen_.resize(count);
  }

  // Whether no better beam has the same latest words and the same last token.
  bool is_distinct(const Beam& beam) {
    const Text& text = texts_[beam.text];
    const uint64_t hash = mixed(mixed(text.late ^ mixed(text.word)) + beam.last_token);
    if (std::find(late_.begin(), late_.end(), hash) != late_.end()) return false;
    late_.push_back(hash);
    return true;
  }

  int32_t word_ended(int32_t text) {
    return texts_[text].word_length ? child(text, kWordEnd) : text;
  }

  int32_t child(int32_t before, uint32_t symbol) {
    int32_t text = texts_[before].first_child;
    while (text != kNowhere && texts_[text].symbol != symbol) text = texts_[text].next_sibling;
    return text != kNowhere ? text : add(before, symbol);
  }

  int32_t add(int32_t before, uint32_t symbol) {
    const int32_t place = static_cast<int32_t>(texts_.size());
    Text text = texts_[before];
    text.before = before;
    text.symbol = symbol;
    text.first_child = kNowhere;
    text.next_sibling = texts_[before].first_child;
    text.visit = 0;
    if (symbol == kWordEnd) {
      text.late = late_words(before);
      text.word_start = place;
      text.word_length = 0;
      text.letters = 0;
      text.word = 0;
      score_word(text, texts_[before].letters);
    } else {
      ++text.word_length;
      text.word = mixed(text.word + symbol);
      if (search_.ngram) text.letters = search_.ngram->spelled(text.letters, symbol);
    }
    double advance = 0;
    if (job_.hotwords) {
      text.hotword_state = step(*job_.hotwords, text.hotword_state, symbol);
      text.hotword_gain += job_.hotwords->gains[text.hotword_state];
      advance = job_.hotwords->advances[text.hotword_state];
    }
    text.finished = text.lm + text.hotword_gain;
    text.unfinished = text.lm + unfinished_word(text) + (text.hotword_gain + advance);
    texts_[before].first_child = place;
    texts_.push_back(text);
    return place;
  }

  void score_word(Text& text, uint32_t letters) {
    if (!search_.ngram) return;
    const uint32_t word = search_.ngram->word_at(letters);
    double log10_prob = search_.ngram->score(text.lm_state, word);
    if (word == Ngram::kUnknown) log10_prob += search_.unk_score_offset;
    text.lm += search_.alpha * log10_prob / kLog10OfE + search_.beta;
  }

  double unfinished_word(const Text& text) const {
    const bool is_known = text.letters != kNone || text.hotword_state != 0;
    if (!search_.ngram || text.word_length == 0 || is_known) return 0;
    return search_.unk_score_offset * std::max(text.word_length, 6) / 6;
  }

  // Hash of the words that the n-gram can see after the last one of `text`.
  uint64_t late_words(int32_t text) const {
    const int seen = std::max(1, search_.ngram ? search_.ngram->order() - 1 : 0);
    uint64_t hash = 1;
    for (int i = 0; i < seen; ++i) {
      hash = mixed(hash + mixed(texts_[text].word));
      const int32_t word_start = texts_[text].word_start;
      if (word_start == 0) break;
      text = texts_[word_start].before;
    }
    return hash;
  }

  // Keeps the texts and emissions of the beams alone.
  void forget() {
    std::vector<int32_t> place(texts_.size(), kNowhere);
    for (const Beam& beam : beams_) mark(texts_, beam.text, place);
    mark(texts_, 0, place);
    compact(texts_, place);
    for (Text& text : texts_) {
      text.first_child = kNowhere;
      text.visit = 0;
      text.word_start = place[text.word_start];
    }
    visit_ = 0;
    for (size_t i = 1; i < texts_.size(); ++i) {
      Text& before = texts_[texts_[i].before];
      texts_[i].next_sibling = before.first_child;
      before.first_child = static_cast<int32_t>(i);
    }
    for (Beam& beam : beams_) beam.text = place[beam.text];

    place.assign(emissions_.size(), kNowhere);
    for (const Beam& beam : beams_) mark(emissions_, beam.emission, place);
    compact(emissions_, place);
    for (Beam& beam : beams_) {
      if (beam.emission != kNowhere) beam.emission = place[beam.emission];
    }
    texts_limit_ = kSpare + 2 * texts_.size();
    emissions_limit_ = kSpare + 2 * emissions_.size();
  }

  template <class T>
  static void mark(const std::vector<T>& nodes, int32_t node, std::vector<int32_t>& place) {
    for (; node != kNowhere && place[node] == kNowhere; node = nodes[node].before) place[node] = 0;
  }

  // Moves the marked nodes, which are later than what is before them, to the front.
  template <class T>
  static void compact(std::vector<T>& nodes, std::vector<int32_t>& place) {
    int32_t count = 0;
    for (size_t i = 0; i < nodes.size(); ++i) {
      if (place[i] == kNowhere) continue;
      T node = nodes[i];
      if (node.before != kNowhere) node.before = place[node.before];
      place[i] = count;
      nodes[count++] = node;
    }
    nodes.resize(count);
  }

  std::vector<Token> tokens_of(int32_t emission) const {
    std::vector<Token> tokens;
    bool is_new = true;
    for (; emission != kNowhere; emission = emissions_[emission].before) {
      const Emission& e = emissions_[emission];
      if (is_new) tokens.push_back({e.token, e.frame, e.frame + 1, e.log_prob});
      tokens.back().start_frame = e.frame;
      tokens.back().log_prob = std::max(tokens.back().log_prob, e.log_prob);
      is_new = !e.repeats;
    }
    std::reverse(tokens.begin(), tokens.end());
    return tokens;
  }

  const Search& search_;
  const Job& job_;
  int64_t frame_ = 0;
  int64_t visit_ = 0;
  std::vector<Text> texts_;
  std::vector<Emission> emissions_;
  std::vector<Beam> beams_;
  size_t texts_limit_ = kSpare, emissions_limit_ = kSpare;

  // Of one frame.
  std::vector<int32_t> tokens_, chosen_;
  int32_t best_token_ = 0;
  std::vector<Beam> candidates_;
  std::vector<uint64_t> late_;
};

void run(const Search& search, Job& job) {
  job.answer = nullptr;
  job.answer_bytes = -1;
  try {
    Utterance utterance(search, job);
    utterance.search();
    const std::vector<char> answer =
        job.wanted == kState ? utterance.state() : utterance.hypotheses(job.wanted == kFinal);
    job.answer = std::malloc(answer.size());
    if (!job.answer) return;
    std::memcpy(job.answer, answer.data(), answer.size());
    job.answer_bytes = answer.size();
  } catch (const std::bad_alloc&) {
  }
}

}  // namespace

EXPORT void ctc_search(const Search* search, Job* jobs, int64_t count) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < count;) run(*search, jobs[i]);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(search->threads, count); ++i) others.emplace_back(work);
  } catch (const std::exception&) {
    // With fewer threads it takes longer.
  }
  work();
  for (std::thread& other : others) other.join();
}

EXPORT void ctc_free(void* answer) { std::free(answer); }

EXPORT Ngram* ngram_new() try {
  return new Ngram;
} catch (const std::bad_alloc&) {
  return nullptr;
}

EXPORT void ngram_free(Ngram* ngram) { delete ngram; }

// 1, or 0: damaged, see ngram_error; or -1: out of memory.
EXPORT int ngram_read(Ngram* ngram, const char* block, int64_t bytes) try {
  return ngram->read({block, static_cast<size_t>(bytes)});
} catch (const std::exception&) {
  return -1;
}

// After the last block; answers as ngram_read does.
EXPORT int ngram_finish(Ngram* ngram) try {
  return ngram->finish();
} catch (const std::exception&) {
  return -1;
}

EXPORT const char* ngram_error(const Ngram* ngram) { return ngram->error().c_str(); }

EXPORT int64_t ngram_order(const Ngram* ngram) { return ngram->order(); }

EXPORT int64_t ngram_num_words(const Ngram* ngram) { return ngram->num_words(); }

EXPORT int ngram_knows(const Ngram* ngram, const char* word) {
  return ngram->word(word) != Ngram::kUnknown;
}

EXPORT uint32_t ngram_start(const Ngram* ngram, int in_sentence) {
  return ngram->start(in_sentence);
}

EXPORT double ngram_score(const Ngram* ngram, uint32_t* state, const char* word) {
  return ngram->score(*state, ngram->word(word));
}
