"""The benchmark: its baselines compute what the program computes, and its tables are right."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import baselines
import biases
import compare_busy
import gpu
import numpy
import pytest
import run as benchmark
import torch
from click.testing import CliRunner
from conftest import draw
from growth import grow_captioning, grow_extraction
from material import made_up_features, write_cache
from measure import Comparison, Ratio, interleave
from small_data import make_small_data

from pipeline.datasets.images import read_square
from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.search import beam_search
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder import load_encoder


@pytest.fixture
def decoders() -> tuple[Decoder, baselines.PlainDecoder]:
    torch.manual_seed(5)
    decoder = Decoder(DecoderConfig(40, 16, 24))
    with torch.no_grad():
        decoder.projection.weight *= 12
        decoder.word_embedding.weight *= 10
        decoder.image_embedding.weight *= 50
    plain = baselines.PlainDecoder(40, 16, 24)
    plain.load_state_dict(decoder.state_dict())
    return decoder.eval(), plain.eval()


def test_the_baselines_network_gives_our_features(tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{number}.png", number, (400, 300)) for number in range(2)]
    encoder = load_encoder("random")
    network = baselines.plain_inception(encoder.trunk.state_dict())
    expected = encoder.encode([read_square(path) for path in paths])
    features = baselines.extract(network, paths, tmp_path / "x.h5")
    assert numpy.allclose(features, expected, rtol=1e-2, atol=1e-3 * numpy.abs(expected).max())


def test_the_baselines_decoder_has_our_loss(
    decoders: tuple[Decoder, baselines.PlainDecoder],
) -> None:
    decoder, plain = decoders
    features = torch.randn(2, 2048)
    captions = torch.tensor([[START_ID, 7, 9, END_ID, PAD_ID], [START_ID, 5, 6, 8, END_ID]])
    criterion = torch.nn.CrossEntropyLoss(ignore_index=PAD_ID, label_smoothing=0.1)
    with torch.no_grad():
        logits = plain(features, captions[:, :-1])
        theirs = criterion(logits.flatten(0, 1), captions[:, 1:].flatten())
        loss, tokens = decoder.loss(features, captions, 0.1)
    assert float(loss / tokens) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.parametrize("longest", [3, 10])
def test_the_baselines_beams_find_our_captions(
    decoders: tuple[Decoder, baselines.PlainDecoder], longest: int
) -> None:
    decoder, plain = decoders
    features = torch.randn(20, 2048, generator=torch.Generator().manual_seed(2))
    ours = beam_search(decoder, features, SearchConfig(max_length=longest))
    theirs = [
        baselines.beam_search(plain, feature.unsqueeze(0), 3, longest, 0.9) for feature in features
    ]
    assert [hypotheses[0].tokens for hypotheses in ours] == theirs
    assert len({tuple(words) for words in theirs}) > 5


def test_a_step_of_the_captioner_with_its_encoder_trains_the_last_layers(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", 1)
    model = baselines.OneStepCaptioner(load_encoder("random").trunk.state_dict(), 12, 8)
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = baselines.RawCaptions(
        [(path, "a b"), (path, "c")], lambda text: [1, *map(ord, text)][:1]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    assert sum(baselines.one_step_batches(model, data, optimizer)) == 2
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert {"inception.fc.weight", "projection.weight", "lstm.weight_ih_l0"} <= changed
    assert not any(name.startswith("inception.Mixed") for name in changed)


def test_sides_run_in_turn_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter([0, 1, 1, 2, 2, 4, 4, 8, 8, 9, 9, 19])  # rounds: warm-up, 2 s 4 s, 1 s 10 s
    monkeypatch.setattr("measure.time.perf_counter", lambda: next(clock))

    def side(name: str) -> int:
        calls.append(name)
        return 20

    result = interleave("x", "image", {"a": lambda: side("a"), "b": lambda: side("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert result.rates == {"a": [10.0, 20.0], "b": [5.0, 2.0]}
    result.compare("a by b", "a", "b", goal=3.0)
    assert result.ratios["a by b"] == Ratio(6.0, 2.0, 10.0, 3.0)


def test_the_table_goes_into_its_page_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    monkeypatch.setattr(benchmark, "PAGE", page)
    comparison = Comparison("x", "image", {"a": [4.0], "b": [2.0]}).compare("speed", "a", "b", 1.5)
    results = {
        "machine": {"cores": 2, "processor": "P", "amx": False, "torch": "2"},
        "material": "images",
        "rounds": 1,
        "comparisons": [benchmark.asdict(comparison)],
        "peak_memory_gb": {"caption.py": 0.9},
    }
    benchmark.put_into_page(benchmark.table(json.loads(json.dumps(results))))
    text = page.read_text()
    assert text.startswith(f"before\n{benchmark.BEGIN}\n")
    assert text.endswith(f"{benchmark.END}\nafter\n")
    assert "| speed | 2.00 (2.00 to 2.00) | 1.5 |" in text
    assert "| peak memory of caption.py, GB | 0.9 |" in text
    assert "old" not in text


@pytest.mark.parametrize("name", ["results.json", "results-avx2.json"])
def test_the_page_has_the_tables_of_the_stored_results(name: str) -> None:
    results = json.loads(benchmark.RESULTS.with_name(name).read_text(encoding="utf-8"))
    assert benchmark.table(results) in benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.PLOT.is_file()


def test_growth_is_measured_on_what_it_says(tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / "images" / f"{number}.jpg", number)
    assert grow_extraction(7, tmp_path) > 0
    assert grow_captioning(300, tmp_path) > 0
    assert len(list((tmp_path / "links-7").iterdir())) == 7
    assert not (tmp_path / "large.h5").exists()


def test_made_up_features_tell_captions_apart(tmp_path: Path) -> None:
    groups = [[["a", "dog"]], [["a", "dog"]], [["two", "boats"]]]
    features = made_up_features(groups)
    same, other = numpy.corrcoef(features)[0, 1:]
    assert same > other + 0.1
    cache = write_cache(tmp_path / "x.h5", features, rows=8)
    assert len(cache) == 8
    assert numpy.allclose(cache.column("features")[7], features[1], atol=0.01)


def test_the_gpu_benchmark_has_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "THREADS", (1, 2))
    monkeypatch.setattr(gpu, "EPOCHS", 1)
    monkeypatch.setattr(gpu, "cpu_has_amx", lambda: False)
    data, features = make_small_data(tmp_path)
    draw(tmp_path / "images" / "a.png")
    words = f"--device cpu --batch 1 --seconds 0 --images {tmp_path / 'images'}"
    options = [*words.split(), "--data", str(data), "--features", str(features)]
    result = CliRunner().invoke(gpu.main, options)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^\| (.+) \| [\d,]+ (?:image|caption)/s \|$", result.stdout, re.MULTILINE)
    assert len(rows) == 2 + 2 + 2, "network, decoding, training"


def test_wait_policies_are_compared_alone_and_beside_busy_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy: list[bool] = [False]
    rates = {("default", False): 4.0, ("passive", False): 3.0, ("default", True): 1.0}

    @contextlib.contextmanager
    def busy_programs() -> Iterator[None]:
        busy[0] = True
        yield
        busy[0] = False

    def measure_once(policy: str, seconds: float) -> dict[str, float]:
        rate = rates.get((policy, busy[0]), 2.0)
        return {"training": rate, "encoding": 2 * rate}

    monkeypatch.setattr(compare_busy, "busy_programs", busy_programs)
    monkeypatch.setattr(compare_busy, "measure_once", measure_once)
    for comparison in compare_busy.compare_busy(rounds=2):
        assert [ratio.median for ratio in comparison.ratios.values()] == [0.75, 2.0]


def test_biases_count_captions_and_references(tmp_path: Path) -> None:
    rows = ["image,caption", "a.jpg,A woman in a red dress .", "b.jpg,a man with dogs"]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    captions = {"a.jpg": "a man in a red shirt", "b.jpg": "a dog runs in redwoods"}
    for name in captions:
        draw(tmp_path / name)
    predictions = tmp_path / "predictions.json"
    records = [{"image_id": name, "caption": text} for name, text in captions.items()]
    predictions.write_text(json.dumps(records))
    result = CliRunner().invoke(biases.main, [str(predictions), "--data", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for line in (
        "| man or men | 50.0 % | 50.0 % |",
        "| woman or women | 0.0 % | 50.0 % |",
        "| red | 50.0 % | 50.0 % |",
        "| dog | 50.0 % | 50.0 % |",
        "of 1 images whose references mention only women and girls: "
        "0 captions mention a woman or a girl, 1 a man or a boy",
    ):
        assert line in result.stdout.splitlines()


def test_the_command_lists_its_parts() -> None:
    result = CliRunner().invoke(benchmark.main, ["--help"])
    assert result.exit_code == 0 and "busy" in result.output
