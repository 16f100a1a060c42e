"""Which words a recogniser gets wrong, and in which utterances it gets most wrong."""

import collections
import io
from collections.abc import Mapping, Sequence

from speechbrain.dataio.wer import print_alignments
from speechbrain.utils.edit_distance import (
    EDIT_SYMBOLS,
    top_wer_utts,
    wer_details_for_batch,
    wer_summary,
)

# Words of an utterance up to which it is counted with the shorter ones.
_LENGTHS = (2, 5, 10, 20, 40)
# Of each kind of error, and of speakers, so many are listed; and so many utterances with a
# hypothesis, and as many for which nothing was recognised.
_TOP_WORDS, _TOP_UTTERANCES = 30, 20


def analyse_errors(
    scores: list[dict],
    characters: list[dict],
    speakers: Mapping[str, str] | None,
) -> str:
    """Describe the errors of one split: confusions, errors by length and speaker, worst utterances.

    Args:
        scores: ``ErrorRateStats.scores``, alignments included.
        characters: the same with ``split_tokens``.
        speakers: by utterance.

    Returns:
        The text of ``errors_<split>.txt``. Equal counts are in alphabetical order, so that the
        text depends on the hypotheses alone.
    """
    substitutions, deletions, insertions = _count_edits(scores)
    occurrences = collections.Counter(word for score in scores for word in score["ref_tokens"])
    summary = wer_summary(scores)
    blocks = [
        f"%WER {summary['WER']:.2f}: {summary['num_edits']} errors in "
        f"{summary['num_scored_tokens']} words; "
        f"{summary['num_erroneous_sents']} of {summary['num_scored_sents']} utterances "
        "have at least one\n",
        _ranking(
            "SUBSTITUTIONS",
            "reference -> hypothesis",
            substitutions,
            lambda pair: f"{pair[0]} -> {pair[1]}",
        ),
        _ranking(
            "DELETIONS",
            "reference word (spoken so many times)",
            deletions,
            lambda word: f"{word} ({occurrences[word]})",
        ),
        _ranking("INSERTIONS", "hypothesis word", insertions, str),
        _ranking(
            "CONFUSED CHARACTERS",
            "reference -> hypothesis",
            _count_edits(characters)[0],
            lambda pair: f"{pair[0]} -> {pair[1]}",
        ),
        _by_length(scores),
    ]
    if speakers:
        blocks.append(_by_speaker(scores, speakers))
    blocks.append(_worst_utterances(scores))
    return "\n".join(blocks)


def _count_edits(scores: list[dict]) -> tuple[collections.Counter, ...]:
    substitutions, deletions, insertions = (collections.Counter() for _ in range(3))
    for score in scores:
        reference, hypothesis = score["ref_tokens"], score["hyp_tokens"]
        for operation, i, j in score["alignment"]:
            if operation == EDIT_SYMBOLS["sub"]:
                substitutions[reference[i], hypothesis[j]] += 1
            elif operation == EDIT_SYMBOLS["del"]:
                deletions[reference[i]] += 1
            elif operation == EDIT_SYMBOLS["ins"]:
                insertions[hypothesis[j]] += 1
    return substitutions, deletions, insertions


def _ranking(title: str, legend: str, counts: collections.Counter, render) -> str:
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_TOP_WORDS]
    lines = [f"{title}: {counts.total()}, {len(counts)} different", f" count  {legend}"]
    lines += [f"{count:6d}  {render(what)}" for what, count in shown]
    if len(counts) > len(shown):
        lines.append(f"        ... and {len(counts) - len(shown)} more")
    return "\n".join(lines) + "\n"


def _by_length(scores: list[dict]) -> str:
    groups: dict[str, list[dict]] = {}
    for score in sorted(scores, key=lambda score: len(score["ref_tokens"])):
        words = len(score["ref_tokens"])
        below = [0, *_LENGTHS]
        first = max(limit for limit in below if limit < words) + 1 if words else 0
        last = next((limit for limit in below if limit >= words), None)
        name = f"{first} and more" if last is None else f"{first} to {last}" if last else "0"
        groups.setdefault(name, []).append(score)
    return _table("BY LENGTH", "words of an utterance", groups)


def _by_speaker(scores: list[dict], speakers: Mapping[str, str]) -> str:
    groups: dict[str, list[dict]] = {}
    for score in scores:
        groups.setdefault(speakers.get(score["key"], "unknown"), []).append(score)
    worst = sorted(groups, key=lambda name: (-_rate(groups[name]), name))
    title = f"BY SPEAKER: {len(groups)}, those with the highest WER first"
    return _table(title, "speaker", {name: groups[name] for name in worst[:_TOP_WORDS]})


def _rate(scores: list[dict]) -> float:
    words = sum(score["num_ref_tokens"] for score in scores)
    return 100 * sum(score["num_edits"] for score in scores) / words if words else 0.0


def _table(title: str, legend: str, groups: Mapping[str, list[dict]]) -> str:
    lines = [title, f" WER %  errors   words  utterances  {legend}"]
    for name, scores in groups.items():
        errors, words = (sum(s[key] for s in scores) for key in ("num_edits", "num_ref_tokens"))
        rate = f"{_rate(scores):6.2f}" if words else "     -"
        lines.append(f"{rate}  {errors:6d}  {words:6d}  {len(scores):10d}  {name}")
    return "\n".join(lines) + "\n"


def _worst_utterances(scores: list[dict]) -> str:
    # top_wer_utts keeps the order of equal rates: among them the utterance with most errors leads.
    wrong = sorted(
        (score for score in scores if score["num_edits"]),
        key=lambda score: (-score["num_edits"], score["key"]),
    )
    if not wrong:
        return "WORST UTTERANCES: every utterance is right\n"
    with_output, without_output = top_wer_utts(wrong, top_k=_TOP_UTTERANCES)
    text = io.StringIO()
    text.write(
        f"WORST UTTERANCES: {len(with_output)} by WER, "
        f"then {len(without_output)} in which nothing was recognised\n"
    )
    print_alignments(with_output + without_output, text)
    return text.getvalue()


def case_hint(texts: Sequence[tuple[str, str]], wer: float) -> str | None:
    """What to say where words differ in letter case alone; None where they do not.

    Args:
        texts: reference and hypothesis of each utterance.
        wer: as they are, in percent.
    """
    words = {word for pair in texts for text in pair for word in text.split()}
    if len({word.casefold() for word in words}) == len(words):
        return None
    references, hypotheses = ([pair[side].casefold().split() for pair in texts] for side in (0, 1))
    details = wer_details_for_batch(range(len(texts)), references, hypotheses)
    folded = wer_summary(details)["WER"]
    if not folded < wer:
        return None
    return (
        "references and hypotheses are written in different letter case. Without regard to it the "
        f"WER would be {folded:.2f} % instead of {wer:.2f} %"
    )
