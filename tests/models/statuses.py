"""What we say of each class of vLLM that ends in routed experts: data, from which docs/models.md is made.

Of the multimodal classes that hold whatever text model their config names, only those that tests run are here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A row of the first table: one that is declared, by the name of its tiny model in tests/tiny.py."""

    title: str
    model: str
    served: str = "tested"
    # The number of the page's note on serving with a CPU.
    note: int = 0
    interpreted: bool = False
    ranks: bool = False


FAMILIES = (
    Family("Mixtral", "mixtral"),
    Family("Qwen2-MoE (Qwen1.5-MoE)", "qwen2_moe"),
    Family("Qwen3-MoE", "qwen3_moe", interpreted=True, ranks=True),
    Family("OLMoE", "olmoe"),
    Family("DeepSeek-V2", "deepseek_v2", note=1),
    Family("DeepSeek-V3", "deepseek_v3", note=1),
    Family("GLM-4.5, 4.6", "glm4_moe"),
    Family("Phi-3.5-MoE", "phimoe"),
    Family("Ernie 4.5 MoE", "ernie4_5_moe", note=2),
    Family("GraniteMoE", "granitemoe"),
    Family("GraniteMoE hybrid (Granite 4)", "granitemoehybrid", note=3),
    Family("Llama 4, the text model", "llama4_text"),
    Family("Qwen3-Next", "qwen3_next", note=3),
    Family("MiniMax-M2", "minimax_m2", served="not yet", note=4),
)


@dataclass(frozen=True)
class Status:
    """Of one class.

    `word` is tested, converts, not yet, refused, or dense: it shares the code of others, and no published model of it
    has experts. `model` is the tiny model that tests run, `why` the reason of a refusal, and `cpu` what vLLM does with
    the model unpacked on a CPU.
    """

    word: str
    model: str = ""
    why: str = ""
    cpu: str = ""


# Greedy tokens of a tiny model in float32 are those of transformers.
_AGREES = "agrees with transformers"
_RECURRENT = "no kernels for its recurrent layers"
_SPARSE = "no sparse attention"
_CUDA = "needs kernels for GPUs"


def _tested(model: str, cpu: str = _AGREES) -> Status:
    return Status("tested", model, cpu=cpu)


def _converts(model: str, cpu: str = "") -> Status:
    return Status("converts", model, cpu=cpu)


def _not_yet(cpu: str = "") -> Status:
    return Status("not yet", cpu=cpu)


def _refused(why: str, cpu: str = "") -> Status:
    return Status("refused", why=why, cpu=cpu)


_BESIDE = _refused("vLLM computes its experts beside the layers that a quantization reaches")
_NOT_TEXT = _refused("it does not write text token by token")
_BACKEND = _refused("no checkpoint has this name: vLLM takes the class for any other architecture of transformers")
_NO_GATE = "its experts have no gate"
_CLAMPED = "its experts clamp what they compute (SwiGLU with a limit)"
_DENSE = Status("dense")
_BIASES = "its experts have biases, and gate and up lie interleaved"
_ONE_TENSOR = "all experts of a layer lie in one two-dimensional tensor"
_ZERO = "its routers also choose experts without weights"
_TWO_SIZES = "text and images have experts of their own, of two sizes in one list"
_THREE_DIMENSIONS = "vLLM loads its experts from three-dimensional tensors alone"

STATUSES: dict[str, Status] = {
    "AfmoeForCausalLM": _converts("afmoe", _AGREES),
    "AriaForConditionalGeneration": _not_yet(_AGREES),
    "AXK1ForCausalLM": _converts("axk1", "wants a norm in dense layers that transformers has not"),
    "BailingMoeForCausalLM": _not_yet(),
    "BailingMoeV2_5ForCausalLM": _not_yet(_RECURRENT),
    "BailingMoeV2ForCausalLM": _not_yet(),
    "BailingMoeV3ForCausalLM": _refused(_CLAMPED, _RECURRENT),
    "BailingMoeV3VLForConditionalGeneration": _refused(_CLAMPED, _RECURRENT),
    "BgeM3EmbeddingModel": _DENSE,
    "ClefOmniForJointSchema": _NOT_TEXT,
    "Cohere2MoeForCausalLM": _tested("cohere2_moe", _AGREES),
    "ColBERTJinaRobertaModel": _DENSE,
    "ColQwen3_5": _NOT_TEXT,
    "Cosmos3EdgeForConditionalGeneration": _refused(_NO_GATE, _RECURRENT),
    "DbrxForCausalLM": _refused(_ONE_TENSOR, "fails to load the experts (KeyError: w13_weight)"),
    "DeepseekForCausalLM": _not_yet(),
    "DeepseekV2ForCausalLM": _tested("deepseek_v2"),
    "DeepseekV32ForCausalLM": _converts("deepseek_v32", _SPARSE),
    "DeepseekV3BidirectionalModel": _NOT_TEXT,
    "DeepseekV3ForCausalLM": _tested("deepseek_v3"),
    "DeepseekV41ForCausalLM": _refused(_CLAMPED),
    "DeepseekV4ForCausalLM": _refused(_CLAMPED),
    "DeepseekV4ForConditionalGeneration": _refused(_CLAMPED),
    "DiffusionGemmaForBlockDiffusion": _NOT_TEXT,
    "Dots3NoteForCausalLM": _not_yet(_CUDA),
    "EmbeddingGemma2Model": _DENSE,
    "Ernie4_5_MoeForCausalLM": _tested("ernie4_5_moe"),
    "Ernie4_5_VLMoeForConditionalGeneration": _refused(_TWO_SIZES),
    "ExaoneMoeForCausalLM": _tested("exaone_moe", _AGREES),
    "ExaoneMoEForCausalLM": _not_yet(),
    "FlexOlmoForCausalLM": _converts("flex_olmo", _AGREES),
    "Gemma4ForCausalLM": _converts("gemma4_text", _AGREES),
    "Gemma4ForConditionalGeneration": _not_yet(_AGREES),
    "Gemma4UnifiedForConditionalGeneration": _not_yet(),
    "Glm4MoeForCausalLM": _tested("glm4_moe"),
    "Glm4MoeLiteForCausalLM": _tested("glm4_moe_lite", f"{_AGREES}¹"),
    "Glm4vForConditionalGeneration": _DENSE,
    "Glm4vMoeForConditionalGeneration": _converts("glm4v_moe", _AGREES),
    "Glm5NextForCausalLM": _refused(_CLAMPED, _RECURRENT),
    "Glm5NextForConditionalGeneration": _refused(_CLAMPED, _RECURRENT),
    "GlmMoeDsaForCausalLM": _converts("glm_moe_dsa", _SPARSE),
    "GlmOcrForConditionalGeneration": _DENSE,
    "GptOssForCausalLM": _refused(_BIASES, "no kernel for experts with biases"),
    "GraniteMoeForCausalLM": _tested("granitemoe"),
    "GraniteMoeHybridForCausalLM": _tested("granitemoehybrid"),
    "GraniteMoeSharedForCausalLM": _converts("granitemoeshared", _AGREES),
    "GraniteMoeSWAForCausalLM": _tested("granitemoe_swa", _AGREES),
    "GteModel": _DENSE,
    "GteNewForSequenceClassification": _DENSE,
    "GteNewModel": _DENSE,
    "HfMoondream": _BESIDE,
    "HunYuanMoEV1ForCausalLM": _tested("hunyuan_v1_moe", _AGREES),
    "HYV3ForCausalLM": _converts("hy_v3", _AGREES),
    "HYV4ForCausalLM": _refused(_CLAMPED, _CUDA),
    "InklingForCausalLM": _not_yet(_CUDA),
    "InklingForConditionalGeneration": _not_yet(_CUDA),
    "InternS1ProForConditionalGeneration": _not_yet(),
    "InternS2MobiusForConditionalGeneration": _not_yet(_RECURRENT),
    "InternS2PreviewForConditionalGeneration": _not_yet(_RECURRENT),
    "JambaForCausalLM": _converts("jamba", f"{_AGREES}³"),
    "JambaForSequenceClassification": _NOT_TEXT,
    "K2HorizonForCausalLM": _not_yet(),
    "KimiK25ForConditionalGeneration": _converts(
        "kimi_k25", "not tried: it wants the checkpoint's own image processor"
    ),
    "KimiK3ForConditionalGeneration": _refused("its experts work on projected inputs", _RECURRENT),
    "KimiLinearForCausalLM": _converts("kimi_linear", _RECURRENT),
    "KimiVLForConditionalGeneration": _not_yet(),
    "LagunaForCausalLM": _converts("laguna", "its router fails⁴"),
    "Lfm2MoeForCausalLM": _tested("lfm2_moe", f"{_AGREES}¹"),
    "Llama4ForCausalLM": _tested("llama4_text"),
    "Llama4ForConditionalGeneration": _converts("llama4", _AGREES),
    "LongcatFlashForCausalLM": _refused(_ZERO),
    "LongcatFlashNgramForCausalLM": _refused(_ZERO),
    "MellumForCausalLM": _tested("mellum", _AGREES),
    "MiMoV2FlashForCausalLM": _converts("mimo_v2_flash", _AGREES),
    "MiMoV2ForCausalLM": _not_yet(),
    "MiMoV2OmniForCausalLM": _not_yet(),
    "MiniCPM3ForCausalLM": _DENSE,
    "MiniCPMForCausalLM": _BESIDE,
    "MiniCPMV": _DENSE,
    "MiniCPMV4_6ForConditionalGeneration": _DENSE,
    "MiniCPMV4_7ForConditionalGeneration": _DENSE,
    "MiniMaxM2ForCausalLM": _converts("minimax_m2", "its router fails"),
    "MiniMaxM3SparseForCausalLM": _refused(_CLAMPED),
    "MiniMaxM3SparseForConditionalGeneration": _refused(_CLAMPED),
    "Mistral3ForConditionalGeneration": _converts(
        "mistral3", "refused where the text model is mistral4, for which it has no class"
    ),
    "MistralLarge3ForCausalLM": _not_yet(),
    "MixtralForCausalLM": _tested("mixtral"),
    "Moondream3ForCausalLM": _BESIDE,
    "NemotronH_Nano_Omni_Reasoning_V3": _refused(_NO_GATE, _RECURRENT),
    "NemotronH_Nano_VL_V2": _refused(_NO_GATE, _RECURRENT),
    "NemotronH_Omni_Reasoning_V3": _refused(_NO_GATE, _RECURRENT),
    "NemotronH_Super_Omni_Reasoning_V3": _refused(_NO_GATE, _RECURRENT),
    "NemotronHForCausalLM": _refused(_NO_GATE, "no kernels for experts without a gate, nor for recurrent layers"),
    "NemotronHPuzzleForCausalLM": _refused(_NO_GATE, _RECURRENT),
    "NomicBertModel": _BESIDE,
    "OlmoeForCausalLM": _tested("olmoe"),
    "OpenAIPrivacyFilterForTokenClassification": _refused(_BIASES),
    "OpenPanguVLForConditionalGeneration": _DENSE,
    "PanguEmbeddedForCausalLM": _DENSE,
    "PanguProMoEV2ForCausalLM": _not_yet(),
    "PanguUltraMoEForCausalLM": _not_yet(),
    "Param2MoEForCausalLM": _not_yet(),
    "PhiMoEForCausalLM": _tested("phimoe"),
    "Qwen2MoeForCausalLM": _tested("qwen2_moe"),
    "Qwen3_5ForCausalLM": _DENSE,
    "Qwen3_5ForConditionalGeneration": _DENSE,
    "Qwen3_5MoeForCausalLM": _converts("qwen3_5_moe_text", f"{_AGREES}³"),
    "Qwen3_5MoeForConditionalGeneration": _converts("qwen3_5_moe", f"{_AGREES}³, with prefix caching off"),
    "Qwen3MoeForCausalLM": _tested("qwen3_moe"),
    "Qwen3NextForCausalLM": _tested("qwen3_next"),
    "Qwen3OmniMoeForConditionalGeneration": _converts("qwen3_omni_moe", _AGREES),
    "Qwen3VLMoeForConditionalGeneration": _converts("qwen3_vl_moe", _AGREES),
    "Qwen4ExpForCausalLM": _not_yet(_CUDA),
    "Qwen4ExpForConditionalGeneration": _not_yet(_CUDA),
    "RobertaForMaskedLM": _DENSE,
    "RobertaModel": _DENSE,
    "SarvamMLAForCausalLM": _not_yet(),
    "SarvamMoEForCausalLM": _not_yet(),
    "Step3p5ForCausalLM": _not_yet(),
    "Step3TextForCausalLM": _refused(_THREE_DIMENSIONS),
    "TransformersMoEEmbeddingModel": _BACKEND,
    "TransformersMoEForCausalLM": _BACKEND,
    "TransformersMoEForSequenceClassification": _BACKEND,
    "TransformersMultiModalMoEForCausalLM": _BACKEND,
    "XLMRobertaModel": _DENSE,
}
