"""An adapter is merged into the model that it was trained on, and into no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fasa_sglang.errors import FasaError
from fasa_sglang.workloads.models import packaged
from fasa_sglang.workloads.models.adapters import load_adapter, merge, save_adapter
from fasa_sglang.workloads.models.lora import attach, fold


class Layer(nn.Module):
    """The projections of one layer that adapters know, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(6, 8, bias=True), nn.Linear(6, 10, bias=False)
        self.norm = nn.Linear(6, 6)


def base_folder(folder: Path, layer: nn.Module) -> Path:
    """A model's folder with its weights in two files."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = {name: weight.clone() for name, weight in layer.state_dict().items()}
    save_file({"norm.weight": weights.pop("norm.weight")}, folder / "model-2.safetensors")
    save_file(weights, folder / "model-1.safetensors")
    return folder


def adapted(layer: nn.Module, file: Path) -> nn.Module:
    """Adapt a layer by random factors and save them; returns the layer with them folded in."""
    adapters = attach(layer, 2, 3)
    for adapter in adapters.values():
        for factor in (adapter.down, adapter.up):
            factor.data = torch.randn_like(factor).bfloat16().float()
    save_adapter(file, "a" * 64, adapters)
    x = torch.randn(5, 6)
    expected = layer.q_proj(x), layer.up_proj(x)
    fold(layer, adapters)
    torch.testing.assert_close((layer.q_proj(x), layer.up_proj(x)), expected)
    return layer


def test_merge_writes_the_adapted_weights_and_copies_the_rest(tmp_path: Path) -> None:
    layer = Layer()
    base = base_folder(tmp_path / "base", layer)
    before = load_file(base / "model-1.safetensors")
    expected = adapted(layer, tmp_path / "x.safetensors").state_dict()
    merge(tmp_path / "x.safetensors", base, "a" * 64, tmp_path / "merged")
    assert (tmp_path / "merged/config.json").read_text() == "{}"
    weights = load_file(tmp_path / "merged/model-1.safetensors")
    weights |= load_file(tmp_path / "merged/model-2.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name])
    assert not torch.allclose(before["q_proj.weight"], weights["q_proj.weight"])


def test_merge_of_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", Layer())
    adapted(Layer(), tmp_path / "x.safetensors")
    reason = r"x\.safetensors is an adapter of another base than base \(base aaaaaaaaaaaa, expected"
    with pytest.raises(FasaError, match=reason):
        merge(tmp_path / "x.safetensors", base, "b" * 64, tmp_path / "merged")
    # The same name, other weights.
    other = tmp_path / "other"
    other.mkdir()
    save_file({"q_proj.weight": torch.zeros(8, 7)}, other / "model.safetensors")
    with pytest.raises(FasaError, match="an adapter of another base than other"):
        merge(tmp_path / "x.safetensors", other, "a" * 64, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("content", [None, b"not an adapter"])
def test_load_adapter_of_another_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.safetensors"
    if content:
        path.write_bytes(content)
    with pytest.raises(FasaError, match=r"x\.safetensors is not an adapter"):
        load_adapter(path)


def test_load_adapter_of_a_models_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"q_proj.weight": torch.zeros(2)}, path)
    with pytest.raises(FasaError, match="is not an adapter"):
        load_adapter(path)


def test_adapted_model_is_merged_once_and_then_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a shipped adapter needs is its file and an entry of ``PACKAGED``."""
    layer = Layer()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fasa-sglang").mkdir()
    base_folder(tmp_path / "fasa-sglang/Base", layer)
    file = tmp_path / "sums.safetensors"
    expected = adapted(layer, file).state_dict()
    base = packaged.PackagedModel("Base", (), "a" * 64, "1 MB")
    monkeypatch.setitem(packaged.PACKAGED, "base", base)
    monkeypatch.setattr(packaged, "ADAPTERS", tmp_path)
    entry = packaged.AdaptedModel("Sums", "base", file.name)
    monkeypatch.setitem(packaged.PACKAGED, "sums", entry)
    folder = Path(packaged.find_model("sums"))
    assert folder.parent == tmp_path / "fasa-sglang" and folder.name.startswith("Sums-")
    weights = load_file(folder / "model-1.safetensors")
    torch.testing.assert_close(weights["q_proj.weight"], expected["q_proj.weight"])
    (tmp_path / "fasa-sglang/Base/config.json").unlink()
    assert packaged.find_model("sums") == str(folder), "the base is not looked at again"


def test_base_identity_of_no_base_is_refused() -> None:
    assert packaged.base_identity("qwen-coder") == packaged.PACKAGED["qwen-coder"].sha256
    with pytest.raises(
        FasaError, match="tinyllama cannot be the base of an adapter, expected one of smol"
    ):
        packaged.base_identity("tinyllama")
