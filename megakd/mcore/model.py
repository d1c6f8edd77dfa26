"""A role's model on this rank: megatron-core GPT chunks that end at the final norm, filled from Hugging Face files.

Legend: B rows, S positions of a row, H hidden width, V local vocabulary columns. In training and scoring there is one
row, the packed sequences of a micro-batch; in rollouts one for each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megakd.batch import Padding
from megakd.check_precision import FP8_MULTIPLES, rows_multiple
from megakd.comm import broadcast_json
from megakd.config import Parallel, Precision
from megakd.errors import ModelError
from megakd.hf.families import Architecture
from megakd.hf.importer import load_parameters
from megakd.hf.pieces import (
    Piece,
    Shard,
    chunk_layers,
    padded_kv_heads,
    padded_vocab,
    pieces,
    spec_of,
    stage_shards,
)
from megakd.mcore.fp8_emulation import AmaxHistories, Emulation
from megakd.mcore.fp8_layers import fill_rows_of, forget_delayed_scaling, make_quantizers, readable, share
from megakd.mcore.grid import Grid
from megakd.mcore.layers import attention_of, local_block, transformer_engine_block
from megakd.objectives.base import LossContext

if TYPE_CHECKING:
    from megakd.mcore.graphs import GraphedForward, Recorder

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
RECOMPUTE = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
FP8_FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""megatron-core's names of the formats that each recipe has by default in Transformer Engine: "hybrid" has gradients in
E5M2."""


class LayerCut(PipelineParallelLayerLayout):
    """How a role's layers are cut (`chunk_layers`), as megatron-core's configuration takes it.

    megatron-core asks its own layout for "this rank" and looks the stage up in its global state, which is the student's
    and not a teacher's. This one answers for the stage that it was made for.
    """

    def __init__(self, layers: int, parallel: Parallel, shards: list[Shard]):
        """`shards`: this rank's chunks."""
        parts = chunk_layers(layers, parallel.pipeline, parallel.virtual_pipeline)
        cut = [[LayerType.decoder] * number for number in parts]
        cut[0].insert(0, LayerType.embedding)
        cut[-1].append(LayerType.loss)
        super().__init__(cut, parallel.pipeline)
        self.shards = shards

    def get_num_layers_to_build(self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None,
                                pp_rank: int | None = None) -> int:
        """Layers of a chunk."""
        assert layer_type == LayerType.decoder and pp_rank is None
        return self.shards[vp_stage or 0].layers

    def get_layer_offset(self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None,
                         pp_rank: int | None = None) -> int:
        """Layers of the model before a chunk."""
        assert layer_type == LayerType.decoder and pp_rank is None
        return self.shards[vp_stage or 0].first_layer


class HiddenGPT(GPTModel):
    """A GPT chunk whose last stage returns hidden states after the final norm; megatron-core never builds logits."""

    def forward(self, tokens_BS: Tensor, position_ids_BS: Tensor, packed: PackedSeqParams | None = None) -> Tensor:
        """tokens_BS, position_ids_BS int64 -> hidden [S, B, H] (S/TP under sequence parallelism).

        `packed` says where the sequences of a packed row lie; None where a cache is attached (rollouts). Chunks after
        the first ignore the tokens and take the tensor that `set_input_tensor` was given.
        """
        hidden_SBH = self.embedding(tokens_BS, position_ids_BS) if self.pre_process else None
        rotary_SB1D = self.rotary_angles(position_ids_BS)
        return self.decoder(
            hidden_states=hidden_SBH, attention_mask=None, rotary_pos_emb=rotary_SB1D, packed_seq_params=packed
        )

    def rotary_angles(self, position_ids_BS: Tensor) -> Tensor:
        """Rotation angles of each row's own positions, [S, B, 1, D] float32 (megatron-core's own assume one row)."""
        frequencies = self.rotary_pos_emb.inv_freq.to(position_ids_BS.device)
        angles_SBd = position_ids_BS.t().unsqueeze(-1).to(frequencies.dtype) * frequencies
        return torch.cat((angles_SBd, angles_SBd), dim=-1).unsqueeze(2)


@dataclass
class Model:
    """One role's model: its chunks on this rank (more than one under virtual pipelining), and where they lie."""

    architecture: Architecture
    grid: Grid
    config: TransformerConfig
    chunks: list[nn.Module]
    shards: list[Shard]
    rows: int
    """What the rows of a micro-batch are a multiple of."""
    amaxes: AmaxHistories | None
    """Of emulated delayed scaling."""
    graphs: GraphedForward | None = None
    """Replays its packed forward pass, where it only runs forward and its role asks for it (graphs.py)."""
    decode_recorder: Recorder | None = None
    """Records its passes of one token a row in rollouts, where its role asks for it."""

    @property
    def head_VH(self) -> Tensor | None:
        """This rank's columns of the LM head on the last pipeline stage, None elsewhere."""
        if not self.grid.is_last_stage:
            return None
        chunk = unwrap(self.chunks[-1])
        # Not `shared_embedding_or_output_weight()`: on a chunk with an embedding that is the embedding, tied or not.
        tied_here = self.architecture.tied_embeddings and self.shards[-1].embedding
        weight = chunk.embedding.word_embeddings.weight if tied_here else chunk.output_layer.weight
        _finish_gather(self.chunks[-1], weight)
        return weight

    @property
    def padding(self) -> Padding:
        """What its packed rows are filled up to: the tensor ranks share a row evenly under sequence parallelism, FP8
        multiplies whole blocks, the interleaved schedule receives ahead of time, when it cannot ask for a micro-batch's
        own size, and a CUDA graph is recorded for each length. And this rank's part of them under context
        parallelism."""
        return Padding(self.rows, uniform=len(self.chunks) > 1, few=self.graphs is not None,
                       context=self.grid.layout.context, context_rank=self.grid.at.context)

    def loss_context(self, chunk_tokens: int | None, counts: Mapping[str, int]) -> LossContext:
        """What a loss over its hidden states needs to know besides them, of steps with these denominators."""
        groups = self.grid.groups
        return LossContext(groups.tp, self.architecture.vocab_size, chunk_tokens, counts,
                           groups.cp if self.grid.layout.context > 1 else None)

    def weights_changed(self) -> None:
        """Has layers that keep their weights rounded to FP8 round them anew. megatron-core's schedules say so to
        Transformer Engine's in each step's first micro-batch; a rollout has no schedule."""
        for chunk in self.chunks:
            unwrap(chunk).set_is_first_microbatch()
        if self.amaxes is not None:
            self.amaxes.weights_changed()

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters and activations."""
        return self.config.params_dtype

    def parameters_of(self, chunk: int) -> dict[str, nn.Parameter]:
        """Local parameters of a chunk by megatron-core name."""
        return dict(unwrap(self.chunks[chunk]).named_parameters())

    def pieces_of(self, chunk: int) -> list[Piece]:
        """Where the chunk's parameters lie in the Hugging Face tensors."""
        return pieces(self.architecture, self.shards[chunk])


def _finish_gather(chunk: nn.Module, weight: nn.Parameter) -> None:
    """Waits for an overlapped all-gather of a weight that is read outside its module's forward pass, which waits by
    itself (megatron-core's hooks). Collective over the data group where that has not begun."""
    if isinstance(chunk, DistributedDataParallel) and chunk.use_forward_hook:
        chunk.param_to_bucket_group[weight].finish_param_sync()


def unwrap(chunk: nn.Module) -> HiddenGPT:
    """The GPT chunk inside DistributedDataParallel and the mixed-precision wrapper."""
    while not isinstance(chunk, HiddenGPT):
        chunk = chunk.module
    return chunk


def transformer_config(
    architecture: Architecture, parallel: Parallel, shards: list[Shard], recompute: str, precision: Precision,
    device: torch.device, *, trained: bool = True,
) -> TransformerConfig:
    """megatron-core's configuration of a rank's `shards` of an architecture under a layout, a choice of RECOMPUTE and a
    precision."""
    kv_heads = padded_kv_heads(architecture.kv_heads, parallel.tensor)
    dtype = TORCH_DTYPES[precision.dtype]
    engine = spec_of(device.type, emulated=precision.emulate) == "te"
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.heads // architecture.kv_heads * kv_heads,
        num_query_groups=kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        # The layers' spec builds the norms. This has their gradients summed over the tensor ranks, each of which has
        # normalised heads of its own, also without sequence parallelism.
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=LayerCut(architecture.layers, parallel, shards),
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The parameters are always read from files.
        perform_initialization=False,
        # The one division by the global token count: see step.py.
        calculate_per_token_loss=True,
        # Micro-batches have their own numbers of tokens (see `Model.padding`).
        variable_seq_lengths=parallel.pipeline > 1 and parallel.virtual_pipeline == 1,
        # One batch of sends between two ranks that are each other's next and previous would mix activations up with
        # gradients: without overlap the interleaved schedule is right for more than two stages only.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        # Unused by dense models, but the default is refused together with variable lengths.
        moe_token_dispatcher_type="alltoall",
        # gloo reads a tensor after the overlapped send has returned: it must not be freed under it.
        deallocate_pipeline_outputs=parallel.virtual_pipeline == 1,
        # The fused forms are compiled at first use, which needs a compiler on the machine; worth it on CUDA only.
        bias_activation_fusion=device.type == "cuda",
        # Transformer Engine's kernel, which takes the angles of one row; a rollout, with a row for each sequence, goes
        # without (`decoder.PACKED_ROWS`).
        apply_rope_fusion=engine,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        # It is on for Transformer Engine's linears of a trained model (optimizer.py, `_add_up_in_place`). Said here,
        # megatron-core asks for NVIDIA's apex to build the head, whose product it never makes.
        gradient_accumulation_fusion=False,
        **RECOMPUTE[recompute],
        **_fp8_options(precision, trained=trained),
    )


def _fp8_options(precision: Precision, *, trained: bool) -> dict[str, object]:
    """What megatron-core is told of FP8: nothing where it is emulated, as its own FP8 is Transformer Engine's."""
    if precision.dtype != "fp8" or precision.emulate:
        return {}
    ends, scaling = precision.first_last_bf16, precision.scaling_of(trained=trained)
    return {
        "fp8": FP8_FORMATS[scaling],
        "fp8_recipe": scaling,
        "fp8_param": precision.holds_fp8_weights(trained=trained),
        "fp8_amax_history_len": precision.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": ends,
        "num_layers_at_end_in_bf16": ends,
    }


def build_model(
    directory: Path,
    architecture: Architecture,
    parallel: Parallel,
    recompute: str,
    precision: Precision,
    grid: Grid,
    device: torch.device,
    *,
    trained: bool = True,
) -> Model:
    """Builds this rank's chunks of a model and fills them from a Hugging Face directory.

    The first replica's ranks read what they hold and the others get it from them, so that what is read of the file
    system does not grow with the number of replicas.

    One that is not `trained` only runs forward: its FP8 scales have no history, and `precision.fp8_weights: teachers`
    holds its weights in FP8. Of trained ones under delayed scaling a process has one at a time.

    Collectives: a broadcast of each parameter over the data group, and one of what went wrong; megatron-core's own for
    tied embeddings.

    Raises:
        ModelError: the directory does not hold the model; on all ranks of a data group.
    """
    spec = spec_of(device.type, emulated=precision.emulate)
    shards = stage_shards(
        architecture,
        tensor_rank=grid.at.tensor,
        tensor_size=parallel.tensor,
        pipeline_rank=grid.at.pipeline,
        pipeline_size=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        spec=spec,
    )
    config = transformer_config(architecture, parallel, shards, recompute, precision, device, trained=trained)
    if trained:
        forget_delayed_scaling(config)
    amaxes, emulation = None, None
    if precision.emulate:
        scaling = precision.scaling_of(trained=trained)
        amaxes = AmaxHistories(precision.amax_history, grid.groups.tp_dp_cp) if scaling == "delayed" else None
        emulation = Emulation(scaling, amaxes)
    chunks, before = [], 0
    for virtual, shard in enumerate(shards):
        numbers = range(shard.first_layer, shard.first_layer + shard.layers)
        roundings = [None if _stays_bf16(number, architecture, precision) else emulation for number in numbers]
        if spec == "te":
            block = transformer_engine_block(shard.layers, qk_norm=architecture.qk_norm)
        else:
            block = local_block(shard.layers, qk_norm=architecture.qk_norm, emulations=roundings)
        # Weights that are made in FP8 without gradients have no second, transposed copy (TE, `reset_parameters`).
        with nullcontext() if trained else torch.no_grad():
            chunk = HiddenGPT(
                config=config,
                transformer_layer_spec=block,
                vocab_size=padded_vocab(architecture.vocab_size, parallel.tensor),
                max_sequence_length=architecture.max_positions,
                pre_process=shard.embedding,
                post_process=shard.head,
                share_embeddings_and_output_weights=architecture.tied_embeddings,
                position_embedding_type="rope",
                rotary_base=architecture.rope_theta,
                rope_scaling=architecture.rope_scaling is not None,
                rope_scaling_factor=architecture.rope_scaling.factor if architecture.rope_scaling else 1.0,
                pg_collection=grid.groups,
                vp_stage=virtual if parallel.virtual_pipeline > 1 else None,
            ).to(device)
        for index, layer in enumerate(chunk.decoder.layers, before):
            attention_of(layer).cache_layer = index
        before += shard.layers
        if config.fp8 is not None:
            make_quantizers(chunk, config)
            fill_rows_of(chunk, FP8_MULTIPLES[config.fp8_recipe])
        if amaxes is not None:
            amaxes.follow(chunk.decoder)
        _mark_sharded(chunk)
        _fill(directory, architecture, shard, chunk, grid.groups.dp_cp)
        chunks.append(chunk)
    return Model(architecture, grid, config, chunks, shards, rows_multiple(precision, parallel), amaxes)


def _stays_bf16(layer: int, architecture: Architecture, precision: Precision) -> bool:
    """Whether a layer, counted over the whole model, is one of those at the ends that take no part in FP8."""
    return not precision.first_last_bf16 <= layer < architecture.layers - precision.first_last_bf16


def _fill(directory: Path, architecture: Architecture, shard: Shard, chunk: HiddenGPT,
          group: dist.ProcessGroup) -> None:
    parameters, problem = dict(chunk.named_parameters()), None
    read = parameters
    if dist.get_rank(group) == 0:
        read = readable(parameters)
        try:
            load_parameters(directory, architecture, shard, read)
        except ModelError as error:
            problem = str(error)
    device = next(iter(parameters.values())).device
    # The others wait to hear: a rank that leaves alone is waited for.
    problem = broadcast_json(problem, 0, group, device)
    if problem is not None:
        raise ModelError(problem)
    share(parameters, read, group)


def _mark_sharded(chunk: HiddenGPT) -> None:
    """Says of the weights that the tensor ranks share out that they do, as megatron-core's initialisation would have.

    The gradient's norm, by which it is clipped, counts every other parameter on the first tensor rank alone.
    Transformer Engine's linears say so themselves.
    """
    for module in chunk.modules():
        # An output layer that is tied to an embedding in the same chunk has no weight of its own.
        sharded = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        if sharded and module.weight is not None:
            axis = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def freeze(model: Model) -> Model:
    """Makes a model a teacher: evaluation mode, no gradients."""
    for chunk in model.chunks:
        chunk.eval()
        chunk.requires_grad_(False)
    return model


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Runs a block in evaluation mode without gradients, then restores the mode."""
    modes = [chunk.training for chunk in model.chunks]
    try:
        for chunk in model.chunks:
            chunk.eval()
        with torch.no_grad():
            yield
    finally:
        for chunk, mode in zip(model.chunks, modes, strict=True):
            chunk.train(mode)
