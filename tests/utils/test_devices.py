"""Choice of device and precision."""

from __future__ import annotations

import pytest
import torch

from pipeline.utils import devices
from pipeline.utils.errors import UserError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_auto_takes_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert devices.choose_device("auto").type == expected


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        chosen = [str(devices.choose_device(name, rank)) for rank in range(4)]
        assert chosen == ["cuda", "cuda:1", "cuda", "cuda:1"]
    assert str(devices.choose_device("cuda:1", 0)) == "cuda:1"
    assert str(devices.choose_device("cpu", 1)) == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "gpu", "meta"])
def test_a_device_that_is_not_there_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {name}: .*cpu"):
        devices.choose_device(name)


@pytest.mark.parametrize(("units", "expected"), [(True, "bf16"), (False, "fp32")])
def test_cpu_takes_bf16_only_where_it_has_the_units(
    units: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_has_amx", lambda: units)
    assert devices.choose_precision("auto", CPU) == expected
    assert devices.choose_training_precision("auto", CPU) == expected
    assert devices.choose_precision("fp32", CPU) == "fp32"


def test_int8_units_are_those_of_avx512_or_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, expected in (({"avx512_vnni": True}, True), ({"avx_vnni": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert devices.cpu_has_int8() == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not devices.cpu_has_int8()


def test_bf16_training_needs_a_cpu_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has no bf16 LSTM below AVX-512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(UserError, match=r"--precision bf16: .* use fp32"):
        devices.choose_training_precision("bf16", CPU)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert devices.choose_training_precision("bf16", CPU) == "bf16"


def test_training_never_takes_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older GPU encodes in fp16 but trains in fp32: the loss is not scaled here."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert devices.choose_precision("auto", CUDA) == "fp16"
    assert devices.choose_training_precision("auto", CUDA) == "fp32"


def test_a_gpu_trains_the_decoder_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert devices.choose_training_precision("auto", CUDA) == "bf16"
    assert devices.choose_decoder_precision("auto", CUDA) == "fp32"
    assert devices.choose_decoder_precision("bf16", CUDA) == "bf16"


def test_autocast_changes_the_arithmetic_only_when_asked() -> None:
    matrix = torch.ones(4, 4)
    with devices.autocast(CPU, "fp32"):
        assert (matrix @ matrix).dtype == torch.float32
    with devices.autocast(CPU, "bf16"):
        assert (matrix @ matrix).dtype == torch.bfloat16
