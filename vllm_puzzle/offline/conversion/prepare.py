"""Everything that is found out about a conversion before anything is written."""

from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..checkpoints.dense import build_model, check_dense
from ..checkpoints.destination import check_room
from ..checkpoints.expert_tensors import check_experts
from ..checkpoints.model_config import text_config
from ..checkpoints.servable import check_servable
from ..checkpoints.shape import MoEShape
from ..checkpoints.source import SourceCheckpoint
from ..errors import CheckpointError
from ..progress import Report
from .calibration import Calibrator
from .calibration_text import CalibrationText, read_calibration_text
from .job import Setup, names_by_layer
from .method import Method
from .methods import open_methods
from .options import ConvertOptions


def prepare(source: Path, new_destination: Path | None, options: ConvertOptions, report: Report) -> Setup:
    """Checks `source`, and reads the calibration text.

    Args:
        new_destination: needs room for a whole checkpoint; None where a conversion is resumed.

    Raises:
        CheckpointError: an option, the source or the calibration text is at fault, or there is no room.
    """
    checkpoint = SourceCheckpoint(source)
    config, shape = checkpoint.config, checkpoint.shape
    text_model = text_config(config)
    if not shape.family.is_declared:
        report(_describe_found(shape))
    check_servable(text_model, shape, str(source / "config.json"))
    check_experts(checkpoint, shape)
    model = build_model(config, source / "config.json")
    if model is None and options.calibration is not None:
        raise CheckpointError(
            f"transformers has no model of {shape.family.architecture}, and calibration runs a text through it; "
            f"convert without --calibration"
        )
    check_dense(checkpoint.shapes, model, shape, source, "download the checkpoint again")
    device = options.torch_device()
    methods = open_methods(options, shape)
    _report_uncompiled(methods[0], device, report)
    if new_destination is not None:
        check_room(new_destination, checkpoint.plain_bytes)
    text = None
    if options.calibration is None:
        report(f"no calibration text was given: {methods[0].blind_notice}")
    else:
        text = read_calibration_text(options.calibration, checkpoint, text_model, options.calibration_sequences)
    return Setup(
        checkpoint,
        names_by_layer(checkpoint, shape),
        ACT2FN[shape.hidden_act],
        device,
        options,
        methods,
        None if text is None else text.record,
        None if text is None else _make_calibrator(checkpoint, model, text, device, report),
    )


def _describe_found(shape: MoEShape) -> str:
    layers = f"{len(shape.moe_layers)} of {shape.num_hidden_layers} layers"
    return (
        f"{shape.family.architecture} is not declared, so what its tensors and config show is taken: {layers} have "
        f"{shape.num_experts} experts of 3 x {shape.intermediate_size} x {shape.hidden_size} with {shape.hidden_act}, "
        f"named like {shape.expert_name(shape.moe_layers[0], 0, shape.family.projections[0])}"
    )


def _report_uncompiled(method: Method, device: torch.device, report: Report) -> None:
    missing = method.missing_library
    if device.type == "cpu" and missing is not None:
        report(
            f"{missing.name} was not compiled when vllm-puzzle was installed (it takes Linux on x86-64 and g++): "
            f"torch takes its place, and converting takes much longer"
        )


def _make_calibrator(
    checkpoint: SourceCheckpoint, model: Any, text: CalibrationText, device: torch.device, report: Report
) -> Calibrator:
    calibrator = Calibrator(checkpoint, model, text.token_ids, device)
    if calibrator.left_out:
        report(
            f"calibration leaves out {len(calibrator.left_out)} tensors that transformers' own model has no place "
            f"for, the first is {calibrator.left_out[0]}; they are copied, and vLLM may refuse them"
        )
    return calibrator
