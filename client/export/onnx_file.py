"""ONNX: one file that runs without torch."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from client.export.embedded import INPUT, KEY, OUTPUT, embed, unembed
from client.export.probing import Fidelity, compare, probe_tiles, takes_other_sizes
from client.students import LoadedStudent, StudentCard
from common.errors import ArtefactError

OPSET = 18


class OnnxNetwork(nn.Module):
    """An ONNX file as a network: tiles (B, 3, S, S) -> logits (B, C, S, S), on torch's number of threads."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors: a warning here is about speed
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of its own for each fault
            raise ArtefactError(f"{path} is no ONNX file that can be run ({type(error).__name__})") from error

    def forward(self, tiles: Tensor) -> Tensor:
        """Raises `ArtefactError` if the file cannot take tiles of this size."""
        try:
            (logits,) = self.session.run([OUTPUT], {INPUT: tiles.contiguous().numpy()})
        except Exception as error:  # onnxruntime has a class of its own for each fault
            size = " x ".join(map(str, tiles.shape[-2:]))
            raise ArtefactError(
                f"the ONNX file cannot take tiles of {size} pixels ({type(error).__name__}): use those of "
                "the size that its card names"
            ) from error
        return torch.from_numpy(logits)

    @property
    def metadata(self) -> dict[str, str]:
        found: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        return found


def load_onnx(path: Path) -> LoadedStudent:
    """Raises `ArtefactError` if ``path`` cannot be run or carries no card."""
    network = OnnxNetwork(path)
    return LoadedStudent(network, unembed(network.metadata.get(KEY, ""), path.name))


def export_onnx(student: LoadedStudent, path: Path) -> Fidelity:
    """Write ``path``: any batch, and any size of tile where the network allows it and gives the same there.

    Raises:
        ArtefactError: if the file's logits are not the student's.
    """
    tile = student.card.image_size
    if takes_other_sizes(student.module, tile):
        _write(student, path, any_size=True)
        try:
            return compare(student.module, OnnxNetwork(path), tile, any_size=True)
        except ArtefactError:
            pass  # the trace kept a size as a constant: the file is made for the one size instead
    _write(student, path, any_size=False)
    return compare(student.module, OnnxNetwork(path), tile, any_size=False)


def _write(student: LoadedStudent, path: Path, any_size: bool) -> None:
    tile = student.card.image_size
    sides = {0: "batch", 2: "height", 3: "width"} if any_size else {0: "batch"}
    with warnings.catch_warnings():
        # What the exporter warns of (an old interface, constants in the trace) is measured afterwards.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            student.module.eval(),
            (probe_tiles(2, tile, tile),),
            str(path),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: sides, OUTPUT: sides},
            opset_version=OPSET,
            dynamo=False,  # the other exporter needs one more package and gives the same graph
        )
    put_card(path, student.card, "onnx")


def put_card(path: Path, card: StudentCard, kind: str) -> None:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {KEY: embed(card, kind)})
    onnx.checker.check_model(model)
    onnx.save(model, path)
