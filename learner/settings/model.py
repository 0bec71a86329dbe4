"""Settings of the model that is trained: made from scratch, or loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from buffer.settings import LocalPath, Settings

Dtype = Literal["float32", "bfloat16"]
"""Number format of a model, or of its trained parameters (`learner.param_dtype`)."""

DTYPE_MEANING = (
    "number format of the learner's products, of frozen weights, and of the weights that are pushed and exported; "
    "trained parameters are held in learner.param_dtype"
)

ALL_LINEAR = "all-linear"

Quantization = Literal["nf4"]


class ScratchModelSettings(Settings):
    """A small model with random weights, sized for the tokenizer of the task."""

    source: Literal["scratch"] = "scratch"
    architecture: Literal["llama", "gpt2"] = "llama"
    hidden_size: PositiveInt = 96
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt | None = Field(
        None, description="heads of keys and values (llama); null = num_heads"
    )
    intermediate_size: PositiveInt = 256
    max_positions: PositiveInt = Field(128, description="longest text (prompt and answer) in tokens")
    tie_embeddings: bool = Field(True, description="share the rows of the input and the output embedding")
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of the initial weights")
    dtype: Dtype = Field("float32", description=DTYPE_MEANING)
    backspace_token: str = Field("<backspace>", description="token of the vocabulary that takes a token back")
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> ScratchModelSettings:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; change one of them"
            )
        if self.architecture != "llama":
            self._refuse_without_effect(f"architecture={self.architecture}", "num_key_value_heads")
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_key_value_heads}; "
                "change one of them"
            )
        return self


class AdapterSettings(Settings):
    """LoRA (arXiv 2106.09685): W + (alpha / rank) B A with W frozen. Defaults: the paper's text task.

    There is no dropout: values and stored log-probabilities are of the model, not of a random sub-network.
    """

    rank: PositiveInt = Field(64, description="columns of B and rows of A")
    alpha: PositiveFloat = Field(16.0, description="the update B A is scaled by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        (ALL_LINEAR,),
        description="linear layers to adapt: names as `q_proj`, or `all-linear` for all but the unembedding",
    )
    train_unembedding: bool = Field(
        True,
        description="train the whole output embedding too, where backspace has its row; where it is tied to the input "
        "embedding, it becomes a matrix of its own",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _take_one_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"target_modules is empty: name linear layers, or say `{ALL_LINEAR}`")
        if ALL_LINEAR in value and len(value) > 1:
            raise ValueError(f"target_modules: `{ALL_LINEAR}` stands alone, it includes the other layers")
        return value


class PretrainedModelSettings(Settings):
    """Any causal language model in the Hugging Face format, or a GGUF file inside an installed package."""

    source: Literal["pretrained"] = "pretrained"
    name: LocalPath = Field(
        description="Hugging Face name, folder, or `package:PACKAGE/FILE.gguf` in an installed package"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the Hugging Face hub")
    dtype: Dtype = Field("bfloat16", description=DTYPE_MEANING)
    backspace_token: str = Field(
        "<backspace>",
        description="what takes a token back: a reserved token of the vocabulary, or the name of a new one",
    )
    add_backspace_row: bool = Field(
        True, description="add a row to the embeddings if the vocabulary does not hold backspace_token"
    )
    adapter: AdapterSettings | None = Field(
        None, description="train low-rank adapters on the frozen model; null = train every weight"
    )
    quantization: Quantization | None = Field(
        None, description="hold the frozen linear layers in 4 bits (QLoRA; needs the extra `qlora`); null = as `dtype`"
    )
    seed: int = Field(0, description="seed of the noise on the backspace row, and of the adapters")

    @model_validator(mode="after")
    def _check(self) -> PretrainedModelSettings:
        if self.quantization is not None and self.adapter is None:
            raise ValueError(
                f"quantization={self.quantization} freezes the linear layers, so nothing could train them: add an "
                "adapter, or leave quantization out"
            )
        if self.revision is not None and self.name.startswith("package:"):
            raise ValueError("revision has no effect on a file of an installed package; leave it out")
        return self


ModelSettings = Annotated[ScratchModelSettings | PretrainedModelSettings, Field(discriminator="source")]
