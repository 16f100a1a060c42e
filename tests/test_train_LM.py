"""Language models: text is streamed, a run resumes to the bit and leaves what decoding loads."""

import gzip
import json
import math
import re
import unicodedata
from itertools import chain
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from speechbrain.lobes.models.transformer.TransformerLM import (
    TransformerLM as SpeechBrainTransformerLM,
)

from common.errors import Interrupted, UserError
from inference.scoring.reports import read_any_results
from modules.lm import MambaLM
from tests.ctc_runs import quick_runs
from text.tokenizer import BOS_ID, EOS_ID, train_tokenizer
from train_LM import main
from training.brains.optimization import count_parameters
from training.launch.command_line import load_hparams, parse_command_line
from training.lm.brain import LMBrain, Perplexity
from training.lm.recipe import name_evaluation, with_text_name, write_results
from training.lm.text_batches import TextBatches, read_sentences
from training.named_evaluation import earlier_evaluations

WORDS = "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN".split()  # noqa: SIM905
SENTENCES = [
    " ".join(WORDS[(start + k) % 10] for k in range(1 + start % 6)) for start in range(120)
]
OVERRIDES = {
    "transformer_small": ["--d_model", "16", "--nhead", "2", "--num_layers", "1", "--d_ffn", "32"],
    "mamba_small": ["--d_model", "16", "--num_layers", "1", "--mamba_config", "{d_state: 4}"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Training text (gzip), validation text, a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    with gzip.open(folder / "train.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(SENTENCES))
    (folder / "valid.txt").write_text("\n".join(SENTENCES[::7]) + "\n", encoding="utf-8")
    train_tokenizer(SENTENCES, folder / "tok.model", token_type="char", output_neurons=24)
    return folder


@pytest.fixture(scope="module")
def tokenizer(files):
    return sentencepiece.SentencePieceProcessor(model_file=str(files / "tok.model"))


def run(files, output_folder, name, *arguments):
    """train_LM.py on a tiny network; its results.json."""
    main(
        [
            f"hparams/LM/{name}.yaml",
            *("--train_text", str(files / "train.txt.gz")),
            *("--valid_text", str(files / "valid.txt")),
            *("--output_folder", str(output_folder)),
            *("--tokenizer_path", str(files / "tok.model")),
            *("--output_neurons", "24", "--max_batch_tokens", "200", "--num_workers", "0"),
            *("--avg_checkpoints", "1", "--n_warmup_steps", "10", "--device", "cpu"),
            *("--precision", "fp32", "--noprogressbar"),
            *OVERRIDES[name],
            *arguments,
        ]
    )
    return json.loads((output_folder / "results.json").read_text(encoding="utf-8"))


def weights(output_folder):
    return torch.load(output_folder / "lm" / "lm.ckpt", weights_only=True)


@pytest.fixture(scope="module", autouse=True)
def _quick_runs():
    with quick_runs():
        yield


class TestRun:
    @pytest.mark.parametrize("name", OVERRIDES)
    def test_it_learns_and_leaves_what_decoding_loads(self, name, files, tmp_path):
        results = run(files, tmp_path, name, "--number_of_epochs", "4", "--lr_adam", "0.01")
        perplexity = results["splits"]["valid"]["perplexity"]
        tokens = results["splits"]["valid"]["tokens"]
        # The unigram perplexity of this text is about 15; it takes context to fall below 9.
        assert perplexity < 9
        assert tokens == sum(len(s) + 2 for s in SENTENCES[::7])
        lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        validations = [entry for entry in map(json.loads, lines) if "valid_loss" in entry]
        assert len(validations) == 4
        assert math.exp(validations[-1]["valid_loss"]) == pytest.approx(validations[-1]["ppl"])
        exported = tmp_path / "lm"
        assert sorted(path.name for path in exported.iterdir()) == ["lm.ckpt", "tokenizer.ckpt"]
        assert (exported / "tokenizer.ckpt").read_bytes() == (files / "tok.model").read_bytes()

    @pytest.mark.parametrize("key", ["valid_text", "test_text"])
    def test_a_text_in_another_letter_case_scores_nothing(self, key, files, tmp_path):
        lower = tmp_path / "lower.txt"
        lower.write_text("one two three\n" * 9, encoding="utf-8")
        with pytest.raises(UserError, match=f"{key} is in another letter case"):
            run(files, tmp_path / "run", "transformer_small", f"--{key}", str(lower))

    @pytest.mark.parametrize("key", ["train_text", "valid_text", "test_text"])
    def test_unknown_characters_stop_the_run_wherever_they_are(
        self, key, files, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("training.lm.recipe.SAMPLE_SENTENCES", 5)
        text = tmp_path / "text.txt"
        text.write_text("ONE TWO THREE\n" * 9 + "ÉTÉ\n", encoding="utf-8")
        arguments = ("transformer_small", "--unknown_characters", "error", f"--{key}", str(text))
        arguments += ("--number_of_epochs", "1")
        with pytest.raises(UserError, match=f"{key}: 1 characters are unknown.*'É' 2"):
            run(files, tmp_path / "run", *arguments)

    def test_what_was_searched_and_cut_is_said(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr("training.lm.recipe.SAMPLE_SENTENCES", 5)
        text = tmp_path / "text.txt"
        text.write_text("ONE TWO É\n" * 9, encoding="utf-8")
        arguments = ("--train_text", str(text), "--max_sentence_tokens", "4")
        run(files, tmp_path, "transformer_small", "--number_of_epochs", "1", *arguments)
        log = (tmp_path / "log.txt").read_text(encoding="utf-8")
        assert "train_text (its first 5 sentences): 1 characters are unknown" in log
        assert "Epoch 1: 9 sentences were cut to max_sentence_tokens (4)." in log

    def test_a_run_stopped_inside_an_epoch_ends_where_the_unbroken_one_ends(
        self, files, tmp_path, monkeypatch
    ):
        arguments = ("--number_of_epochs", "2", "--max_sentence_tokens", "20")
        run(files, tmp_path / "whole", "transformer_small", *arguments)

        def stop_at_step_13(brain, batch, outputs, loss, should_step):
            end_of_batch(brain, batch, outputs, loss, should_step)
            if brain.optimizer_step == 13:
                brain.stop_request.signal_number = 2

        end_of_batch = LMBrain.on_fit_batch_end
        with monkeypatch.context() as patch:
            patch.setattr(LMBrain, "on_fit_batch_end", stop_at_step_13)
            # The flag is set after the step that asked for it and honoured after the next.
            with pytest.raises(Interrupted):
                run(files, tmp_path / "broken", "transformer_small", *arguments)
        assert not (tmp_path / "broken" / "results.json").exists()
        run(files, tmp_path / "broken", "transformer_small", *arguments)
        whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
        assert all(torch.equal(whole[name], broken[name]) for name in whole)
        # Those of the batches before the interruption are not known any more.
        told = {
            name: re.findall(
                r"Epoch \d.* sentences were cut", (tmp_path / name / "log.txt").read_text()
            )
            for name in ("whole", "broken")
        }
        assert [line.split(":")[0] for line in told["whole"]] == ["Epoch 1", "Epoch 2"]
        assert re.match(r"Epoch \d from batch \d+ on: ", told["broken"][-1])

    @pytest.mark.parametrize(
        "changed",
        [("--max_batch_tokens", "100"), ("--seed", "5"), ()],
        ids=str,
    )
    def test_an_interrupted_epoch_begins_again_where_its_batches_are_others_now(
        self, changed, files, tmp_path, monkeypatch
    ):
        stop, seen = [5], []
        end_of_batch = LMBrain.on_fit_batch_end

        def on_fit_batch_end(brain, batch, *others):
            end_of_batch(brain, batch, *others)
            seen.append(brain.step)
            if stop and brain.step == stop[0]:
                brain.stop_request.signal_number = stop.pop()

        monkeypatch.setattr(LMBrain, "on_fit_batch_end", on_fit_batch_end)
        arguments = ("transformer_small", "--number_of_epochs", "1")
        with pytest.raises(Interrupted):
            run(files, tmp_path, *arguments)
        assert seen == [1, 2, 3, 4, 5, 6]
        seen.clear()
        run(files, tmp_path, *arguments, *changed)
        assert seen[0] == (1 if changed else 7)
        log = (tmp_path / "log.txt").read_text(encoding="utf-8")
        assert ("The interrupted epoch begins again" in log) == bool(changed)

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_the_last_batches_of_an_epoch_are_not_dropped_and_weigh_as_much(
        self, workers, files, tmp_path, monkeypatch
    ):
        scaled = []
        monkeypatch.setattr(
            "training.brains.run_brain.scale_gradients", lambda _, factor: scaled.append(factor)
        )
        setting = ("--grad_accumulation_factor", "4", "--num_workers", workers)
        run(files, tmp_path, "transformer_small", "--number_of_epochs", "1", *setting)
        text = TextBatches(
            [files / "train.txt.gz"],
            sentencepiece.SentencePieceProcessor(model_file=str(files / "tok.model")),
            max_batch_tokens=200,
            seed=load_hparams(
                "hparams/LM/transformer_small.yaml", {"train_text": "-", "valid_text": "-"}
            )["seed"],
        )
        windows, rest = divmod(len(list(text)), 4)
        assert rest
        assert scaled == [4 / rest]
        lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[-1])["step"] == windows + 1

    def test_outputs_follow_the_tokenizer(self, files, tmp_path):
        main(
            [
                "hparams/LM/transformer_small.yaml",
                *("--train_text", str(files / "train.txt.gz")),
                *("--valid_text", str(files / "valid.txt"), "--output_folder", str(tmp_path)),
                *("--tokenizer_path", str(files / "tok.model"), "--number_of_epochs", "1"),
                *("--num_workers", "0", "--device", "cpu", "--noprogressbar"),
                *OVERRIDES["transformer_small"],
            ]
        )
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(files / "tok.model"))
        results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        assert results["model"]["output_neurons"] == tokenizer.get_piece_size()

    def test_another_text_is_refused_in_the_folder_of_a_run(self, files, tmp_path):
        run(files, tmp_path, "transformer_small", "--number_of_epochs", "1")
        with pytest.raises(UserError, match=r"the training text .*valid.txt"):
            run(files, tmp_path, "transformer_small", "--train_text", str(files / "valid.txt"))
        # The same under another name goes on.
        moved = tmp_path / "moved.txt.gz"
        moved.write_bytes((files / "train.txt.gz").read_bytes())
        longer = ("--train_text", str(moved), "--number_of_epochs", "2")
        run(files, tmp_path, "transformer_small", *longer)

    def test_an_evaluation_alone_needs_a_trained_run(self, files, tmp_path):
        with pytest.raises(UserError, match="trained run"):
            run(files, tmp_path, "transformer_small", "--test_only")

    def test_an_evaluation_alone_has_a_record_of_its_own(self, files, tmp_path):
        trained = run(files, tmp_path, "transformer_small", "--number_of_epochs", "1")
        other = tmp_path / "other.txt"
        other.write_text("ONE TWO THREE\n", encoding="utf-8")
        scored = ("--test_only", "--valid_text", str(other))
        results = run(files, tmp_path, "transformer_small", *scored)
        assert {key: results[key] for key in trained} == trained
        assert results["evaluations"]["other"]["splits"]["valid"]["sentences"] == 1
        results = run(files, tmp_path, "transformer_small", *scored, "--eval_name", "mine")
        assert results["evaluations"].keys() == {"other", "mine"}
        # The model itself stays, whatever an evaluation averages.
        before = (tmp_path / "lm" / "lm.ckpt").read_bytes()
        more = run(files, tmp_path, "transformer_small", *scored, "--avg_checkpoints", "2")
        assert more["evaluations"].keys() == {"other", "mine", "other_best2"}
        assert (tmp_path / "lm" / "lm.ckpt").read_bytes() == before
        for other_perplexity in (
            ("--avg_checkpoints", "2"),
            ("--unknown_characters", "skip"),
            ("--max_sentence_tokens", "4"),
        ):
            with pytest.raises(UserError, match="mine is another evaluation of this run"):
                run(
                    *(files, tmp_path, "transformer_small", *scored),
                    *(*other_perplexity, "--eval_name", "mine"),
                )

    def test_a_tokenizer_is_trained_where_none_is_given(self, files, tmp_path):
        setting = ["--tokenizer_path", "null", "--token_type", "char", "--number_of_epochs", "1"]
        run(files, tmp_path, "transformer_small", *setting)
        trained = sentencepiece.SentencePieceProcessor(
            model_file=str(tmp_path / "lm" / "tokenizer.ckpt")
        )
        assert trained.encode("TEN", out_type=str) == ["▁", "T", "E", "N"]

    def test_a_tokenizer_without_checkpoints_is_made_anew(self, files, tmp_path):
        save = tmp_path / "save"
        save.mkdir()
        (save / "tokenizer.model").write_text("of a run that ended before its first checkpoint")
        run(files, tmp_path, "transformer_small", "--number_of_epochs", "1")
        assert (save / "tokenizer.model").read_bytes() == (files / "tok.model").read_bytes()

    def test_checkpoints_keep_their_tokenizer(self, files, tmp_path):
        run(files, tmp_path, "transformer_small", "--number_of_epochs", "1")
        setting = ["--tokenizer_path", "null", "--token_type", "char"]
        with pytest.raises(UserError, match="holds checkpoints of a run with tokenizer"):
            run(files, tmp_path, "transformer_small", *setting)

    def test_first_weights_bring_their_tokens_along(self, files, tmp_path):
        text = tmp_path / "other.txt"
        text.write_text("\n".join(f"TEN ZOO {line}" for line in SENTENCES), encoding="utf-8")
        own = ["--tokenizer_path", "null", "--token_type", "char", "--number_of_epochs", "1"]
        run(files, tmp_path / "first", "transformer_small", *own)
        (checkpoint,) = (tmp_path / "first" / "save").glob("CKPT*/model.ckpt")
        other = ["--train_text", str(text), "--init_from", str(checkpoint)]
        run(files, tmp_path / "second", "transformer_small", *own, *other)
        first, second = (tmp_path / name / "save/tokenizer.model" for name in ("first", "second"))
        assert second.read_bytes() == first.read_bytes()
        train_tokenizer(["TEN ZOO"], tmp_path / "t", token_type="char", output_neurons=24)
        given = ["--tokenizer_path", str(tmp_path / "t"), "--number_of_epochs", "1"]
        with pytest.raises(UserError, match="this run has others"):
            run(files, tmp_path / "third", "transformer_small", *given, *other)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--train_text", "nowhere.txt"], "train_text nowhere.txt: there is no"),
            (["--tokenizer_path", "nowhere.model"], "tokenizer_path nowhere.model"),
            (["--output_neurons", "5"], "belongs to another model"),
            (["--valid_text", "null"], "valid_text is empty"),
            (["--valid_text", "{empty}"], "valid_text: .*empty.txt has no sentence"),
            (["--test_text", "{greek}"], "test_text: .*greek.txt has no sentence to score in"),
            (
                ["--valid_text", "{mixed}", "--unknown_characters", "skip"],
                "valid_text: .*mixed.txt has no sentence to score without unknown",
            ),
            (
                ["--max_sentence_tokens", "2500"],
                "max_sentence_tokens is 2500, .*positional_encoding of the model ends at 2500",
            ),
        ],
    )
    def test_what_the_user_got_wrong_is_said(self, arguments, message, files, tmp_path):
        texts = {"empty": "\n\n", "greek": "αβγ\n", "mixed": "ONE αβγ TWO\n"}
        for name, text in texts.items():
            (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        paths = {name: tmp_path / f"{name}.txt" for name in texts}
        arguments = [word if "{" not in word else word.format(**paths) for word in arguments]
        with pytest.raises(UserError, match=message):
            run(files, tmp_path, "transformer_small", *arguments)
        assert not (tmp_path / "metrics.jsonl").exists()


def test_results_of_a_damaged_file_are_kept_and_infinity_is_null(tmp_path, caplog):
    path = tmp_path / "results.json"
    path.write_text('{"splits": {', encoding="utf-8")
    hparams = SimpleNamespace(
        seed=1, model=torch.nn.Linear(1, 1), token_type="char", output_neurons=9
    )
    brain = SimpleNamespace(
        hparams=hparams, precision="fp32", eval_precision="fp32", device=torch.device("cpu")
    )
    assert name_evaluation(tmp_path, "mine", {}) == "mine"
    scores = {"valid": Perplexity(800.0, 1, 1), "test": Perplexity(0.0, 1, 1)}
    write_results(tmp_path, brain, scores, ["train_LM.py"], None)
    written = json.loads(path.read_text(encoding="utf-8"))
    found = {name: entry["perplexity"] for name, entry in written["splits"].items()}
    assert found == {"valid": None, "test": 1.0}
    assert (tmp_path / "results.json.unreadable").read_text(encoding="utf-8") == '{"splits": {'
    assert "kept as" in caplog.text
    # What a language model has written is not taken for damaged.
    write_results(tmp_path, brain, scores, ["train_LM.py"], ("mine", {}))
    assert json.loads(path.read_text(encoding="utf-8"))["run"] == written["run"]
    assert earlier_evaluations(tmp_path, read_any_results).keys() == {"mine"}


class TestFiles:
    @pytest.mark.parametrize("name", ["mamba_small", "transformer_small", "transformer_large"])
    def test_the_folder_is_that_of_the_text_and_the_seed(self, name):
        def folder(*arguments):
            text = ("--train_text", "corpora/first.txt.gz", "--valid_text", "dev.txt")
            line = parse_command_line([f"hparams/LM/{name}.yaml", *text, *arguments], "")
            line = with_text_name(line)
            with torch.device("meta"):
                return str(load_hparams(line.param_file, line.overrides)["output_folder"])

        seed = folder().rsplit("/", 1)[1]
        assert folder() == f"results/LM/{name}/first/{seed}"
        assert folder("--text_name", "other") == f"results/LM/{name}/other/{seed}"
        assert folder("--output_folder", "mine") == "mine"

    def test_the_large_one_has_the_published_size_and_class(self):
        with torch.device("meta"):
            hparams = load_hparams(
                "hparams/LM/transformer_large.yaml", {"train_text": "-", "valid_text": "-"}
            )
        assert isinstance(hparams["model"], SpeechBrainTransformerLM)
        assert count_parameters([hparams["model"]]) == 93_333_128

    def test_the_small_transformer_is_what_the_small_recognisers_expect(self):
        hparams = load_hparams(
            "hparams/LM/transformer_small.yaml",
            {"train_text": "-", "valid_text": "-", "output_neurons": 50},
        )
        for recogniser in ("an4", "demo"):
            expected = load_hparams(
                f"hparams/S2S/{recogniser}.yaml", {"data_folder": "-", "output_neurons": 50}
            )["lm_model"]()
            shapes = {name: value.shape for name, value in expected.state_dict().items()}
            assert shapes == {
                name: value.shape for name, value in hparams["model"].state_dict().items()
            }

    def test_the_mamba_is_one(self):
        hparams = load_hparams(
            "hparams/LM/mamba_small.yaml", {"train_text": "-", "valid_text": "-"}
        )
        assert isinstance(hparams["model"], MambaLM)


class TestText:
    def batches(self, files, tokenizer, **options):
        defaults = {"max_batch_tokens": 200, "seed": 1, "chunk_sentences": 50}
        return TextBatches([files / "train.txt.gz"], tokenizer, **(defaults | options))

    def sentences(self, batches, tokenizer):
        found = []
        for batch in batches:
            for row, count in zip(batch.tokens_bos, batch.num_tokens_B.tolist(), strict=True):
                found.append(tokenizer.decode(row[1:count].tolist()))
        return found

    def test_an_epoch_has_every_sentence_once(self, files, tokenizer):
        found = self.sentences(self.batches(files, tokenizer), tokenizer)
        assert sorted(found) == sorted(SENTENCES)

    def test_input_and_target_are_shifted_by_one(self, files, tokenizer):
        for batch in self.batches(files, tokenizer):
            ends = batch.num_tokens_B - 1
            assert (batch.tokens_bos[:, 0] == BOS_ID).all()
            assert (batch.tokens_eos.gather(1, ends[:, None]) == EOS_ID).all()
            for row, end in enumerate(ends.tolist()):
                assert batch.tokens_bos[row, 1 : end + 1].equal(batch.tokens_eos[row, :end])
                assert not batch.tokens_bos[row, end + 1 :].any()

    def test_batches_keep_to_their_bound(self, files, tokenizer):
        batches = list(self.batches(files, tokenizer, max_batch_tokens=60))
        assert all(
            batch.tokens_bos.numel() <= 60 or len(batch.tokens_bos) == 1 for batch in batches
        )
        assert max(len(batch.tokens_bos) for batch in batches) > 1

    def test_the_text_is_read_as_it_is_needed(self, files, tokenizer, monkeypatch):
        read = 0

        def counted(paths):
            nonlocal read
            for sentence in read_sentences(paths):
                read += 1
                yield sentence

        monkeypatch.setattr("training.lm.text_batches.read_sentences", counted)
        next(iter(self.batches(files, tokenizer, chunk_sentences=10)))
        assert read == 10

    def test_epochs_differ_and_repeat(self, files, tokenizer):
        batches = self.batches(files, tokenizer)
        first = self.sentences(batches, tokenizer)
        batches.set_position(epoch=2, first_batch=0)
        second = self.sentences(batches, tokenizer)
        batches.set_position(epoch=1, first_batch=0)
        assert first != second
        assert self.sentences(batches, tokenizer) == first

    @pytest.mark.parametrize("first_batch", [0, 1, 5])
    def test_an_epoch_can_be_entered_at_any_batch(self, first_batch, files, tokenizer):
        batches = self.batches(files, tokenizer)
        whole = [batch.tokens_bos for batch in batches]
        batches.set_position(epoch=1, first_batch=first_batch)
        rest = [batch.tokens_bos for batch in batches]
        assert len(rest) == len(whole) - first_batch
        assert all(a.equal(b) for a, b in zip(rest, whole[first_batch:], strict=True))

    def test_processes_share_an_epoch_in_equal_numbers(self, files, tokenizer):
        shares = []
        for rank in range(3):
            batches = self.batches(files, tokenizer)
            batches.set_position(epoch=1, first_batch=0, rank=rank, num_ranks=3)
            shares.append(list(batches))
        everything = list(self.batches(files, tokenizer))
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) == len(everything) // 3
        assert shares[1][0].tokens_bos.equal(everything[1].tokens_bos)

    def test_workers_change_nothing(self, files, tokenizer):
        alone = [batch.tokens_bos for batch in self.batches(files, tokenizer)]
        batches = self.batches(files, tokenizer)
        batches.set_position(epoch=1, first_batch=3)
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=2)
        loaded = [batch.tokens_bos for batch in loader]
        assert all(a.equal(b) for a, b in zip(loaded, alone[3:], strict=True))

    def test_parts_of_the_text_make_up_the_whole(self, files, tokenizer):
        batches = self.batches(files, tokenizer, num_parts=3, chunk_sentences=20)
        found = []
        for epoch in (1, 2, 3):
            batches.set_position(epoch, first_batch=0)
            found += self.sentences(batches, tokenizer)
        assert sorted(found) == sorted(SENTENCES)

    @pytest.mark.parametrize("num_parts", [2, 7, 120])
    def test_a_text_of_less_than_a_chunk_has_parts_too(self, num_parts, files, tokenizer):
        batches = self.batches(files, tokenizer, num_parts=num_parts, chunk_sentences=1000)
        batches.fit_parts(num_ranks=1)
        found = []
        for epoch in range(1, num_parts + 1):
            batches.set_position(epoch, first_batch=0)
            part = self.sentences(batches, tokenizer)
            assert len(part) >= len(SENTENCES) // num_parts
            found += part
        assert sorted(found) == sorted(SENTENCES)

    def test_parts_without_text_for_every_process_are_refused(self, files, tokenizer):
        with pytest.raises(UserError, match=r"text_parts is 121, but .*train.txt.gz has 120 sent"):
            self.batches(files, tokenizer, num_parts=121).fit_parts(num_ranks=1)
        with pytest.raises(UserError, match=r"epoch 1 has fewer batches than processes \(3\)"):
            self.batches(files, tokenizer, num_parts=60).fit_parts(num_ranks=3)

    def test_parts_of_a_long_text_stay_chunks(self, files, tokenizer):
        batches = self.batches(files, tokenizer, num_parts=3, chunk_sentences=20)
        batches.fit_parts(num_ranks=1)
        assert batches.chunk_sentences == 20

    def test_without_a_seed_the_order_is_the_same_in_every_epoch(self, files, tokenizer):
        batches = self.batches(files, tokenizer, seed=None)
        first = self.sentences(batches, tokenizer)
        batches.set_position(epoch=2, first_batch=0)
        assert self.sentences(batches, tokenizer) == first

    def predicted(self, batches):
        return [
            row[:count].tolist()
            for batch in batches
            for row, count in zip(batch.tokens_eos, batch.num_tokens_B.tolist(), strict=True)
        ]

    def test_long_sentences_are_cut_and_do_not_end_there(self, files, tokenizer):
        batches = list(self.batches(files, tokenizer, max_sentence_tokens=4))
        whole = [[*tokenizer.encode(sentence), EOS_ID] for sentence in SENTENCES]
        assert sorted(self.predicted(batches)) == sorted(tokens[:5] for tokens in whole)
        assert sum(batch.num_cut for batch in batches) == sum(len(tokens) > 5 for tokens in whole)

    def test_every_token_of_a_held_out_sentence_counts_once(self, files, tokenizer):
        score = Perplexity()
        pieces = list(self.batches(files, tokenizer, seed=None, max_sentence_tokens=4))
        for batch in pieces:
            assert batch.num_tokens_B.max() <= 5
            score.add(1.0, batch)
        whole = list(self.batches(files, tokenizer, seed=None))
        assert score.num_sentences == len(SENTENCES)
        assert score.num_tokens == sum(len(tokenizer.encode(s)) + 1 for s in SENTENCES)
        tokens = [sorted(chain(*self.predicted(batches))) for batches in (pieces, whole)]
        assert tokens[0] == tokens[1]
        # What a piece goes on from is the token before it.
        path = files / "one.txt"
        path.write_text("TEN TEN", encoding="utf-8")
        one = TextBatches([path], tokenizer, 200, max_sentence_tokens=4)
        rows = sorted(row for batch in one for row in batch.tokens_bos.tolist())
        encoded = tokenizer.encode("TEN TEN")
        assert rows == sorted([[BOS_ID, *encoded[:4]], [*encoded[4:], 0]])

    def test_text_without_known_characters_is_an_error(self, tmp_path, tokenizer):
        path = tmp_path / "other.txt"
        path.write_text("αβγ\n", encoding="utf-8")
        with pytest.raises(UserError, match="fewer batches"):
            list(TextBatches([path], tokenizer, max_batch_tokens=100))
        path.write_text("αβγ\nONE αβγ TWO\n", encoding="utf-8")
        batches = TextBatches([path], tokenizer, max_batch_tokens=100)
        assert self.predicted(batches) == [[*tokenizer.encode("ONE TWO"), EOS_ID]]
        empty = tmp_path / "empty.txt"
        empty.write_text("\n", encoding="utf-8")
        with pytest.raises(UserError, match="fewer batches"):
            list(TextBatches([empty], tokenizer, max_batch_tokens=100))
        with pytest.raises(UserError, match="no sentence"):
            TextBatches([empty], tokenizer, max_batch_tokens=100).fit_parts(num_ranks=1)

    @pytest.mark.parametrize("name", ["t.tsv", "t.jsonl", "T.TSV"])
    def test_a_table_is_no_text(self, name, tmp_path):
        (tmp_path / name).write_text("path\ttext\na.wav\tONE\n", encoding="utf-8")
        with pytest.raises(UserError, match=rf"{name} is a table.*corpora.prepare table makes"):
            list(read_sentences([tmp_path / name]))

    def test_names_may_be_in_upper_case(self, files, tmp_path):
        (tmp_path / "T.GZ").write_bytes((files / "train.txt.gz").read_bytes())
        assert list(read_sentences([tmp_path / "T.GZ"])) == SENTENCES
        (tmp_path / "T.CSV").write_text("ID,duration,wav,spk_id,wrd\na,1,a.wav,s,ONE\n")
        assert list(read_sentences([tmp_path / "T.CSV"])) == ["ONE"]

    def test_accents_are_one_letter_however_the_text_writes_them(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text(unicodedata.normalize("NFD", "ÉTÉ"), encoding="utf-8")
        assert list(read_sentences([path])) == ["ÉTÉ"]

    def test_a_damaged_file_is_an_error(self, files, tmp_path):
        broken = tmp_path / "broken.txt.gz"
        broken.write_bytes((files / "train.txt.gz").read_bytes()[:-20])
        with pytest.raises(UserError, match="damaged"):
            list(read_sentences([broken]))


def test_sentences_with_unknown_characters_can_be_left_out(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("ONE TWO\nONE É TWO\n", encoding="utf-8")
    for skip, sentences in ((False, 2), (True, 1)):
        batches = list(TextBatches([path], tokenizer, 200, skip_unknown=skip))
        assert sum(len(batch.num_tokens_B) for batch in batches) == sentences
