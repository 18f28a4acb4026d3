"""What a packed checkpoint has around its shards: index, config, manifest, model card and the files that travel."""

from collections.abc import Sequence

import vllm_puzzle
from vllm_puzzle.format import Provenance, PuzzleMoEQuantizationConfig, packed_config, parse_expert_name

from ..checkpoints.checkpoint import SourceHash
from ..checkpoints.expert_tensors import expected_experts
from ..checkpoints.manifest import MANIFEST_FILE, Manifest
from ..checkpoints.shards import TensorLayout
from ..checkpoints.writer import CheckpointWriter
from ..merging.changes import WeightChanges
from ..wording import label
from .job import Job
from .method import LayerReport
from .model_card import ConvertResult, ModelCard, write_model_card
from .units import Unit, UnitResult


def finish_checkpoint(
    job: Job,
    units: Sequence[Unit],
    results: Sequence[UnitResult],
    reports: Sequence[LayerReport],
    writer: CheckpointWriter,
    name: str,
) -> ConvertResult:
    """Writes what makes the shards of all units a checkpoint.

    Args:
        reports: of the MoE layers.
        name: what the model card calls the checkpoint.
    """
    checkpoint = job.checkpoint
    if job.calibration is None:
        # Without tokens a loss tells the experts of a layer apart, but there is no residual stream to compare it with.
        reports = [report.without_loss() for report in reports]
    shards = [shard for unit in units for shard in unit.shards]
    quantization = _describe_quantization(job, units, results)
    result = _sum_up(job, [tensor for shard in shards for tensor in shard.tensors], reports)
    writer.add_index(shards)
    writer.add_json("config.json", packed_config(checkpoint.raw_config, quantization))
    manifest = Manifest(
        tool_version=vllm_puzzle.__version__,
        shards=[entry for each in results for entry in each.shards],
        **job.method.manifest(reports),
    )
    writer.add_json(MANIFEST_FILE, manifest.to_json())
    writer.add_copies(checkpoint.path, checkpoint.other_files())
    source = label(checkpoint.path.absolute())
    sections = job.method.card(job, reports)
    write_model_card(writer, ModelCard(source, name, quantization, result, sections, checkpoint.is_quantized))
    return result


def _describe_quantization(
    job: Job, units: Sequence[Unit], results: Sequence[UnitResult]
) -> PuzzleMoEQuantizationConfig:
    shape, method = job.shape, job.method
    return PuzzleMoEQuantizationConfig(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        **method.quantization(job, [unit.layout for unit in units if unit.layout is not None]),
        provenance=Provenance(
            rule=method.rule,
            **method.provenance(),
            seed=job.options.seed,
            calibration=job.calibration,
            source_sha256=SourceHash(line for result in results for line in result.source).hexdigest(),
            tool_version=vllm_puzzle.__version__,
        ),
    )


def _sum_up(job: Job, written: Sequence[TensorLayout], reports: Sequence[LayerReport]) -> ConvertResult:
    total = WeightChanges()
    for report in reports:
        total.add(report.changes)
    before = job.checkpoint.tensors
    return ConvertResult(
        expert_bytes_before=sum(before[name].num_bytes for name in expected_experts(job.shape)),
        expert_bytes_after=sum(tensor.num_bytes for tensor in written if parse_expert_name(tensor.name)),
        checkpoint_bytes_before=job.checkpoint.num_bytes,
        checkpoint_bytes_after=sum(tensor.num_bytes for tensor in written),
        relative_error=total.relative_error,
    )
