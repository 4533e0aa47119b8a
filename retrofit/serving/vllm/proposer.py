"""The drafter of a server: vLLM's speculative method `custom_class`, over the target's own modules.

After each step of vLLM's model runner V1 it runs one forward over [seed | M_1..M_K] of every request that has emitted
something, and hands over the root, K drafts and, for sampled requests, what they were drawn from.  Only tokens that
vLLM verifies are emitted, so what is drafted changes speed, never output.  Not here: scheduling, verification, cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import __version__
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from retrofit.adapters.heads import Heads, load_heads
from retrofit.adapters.layout import DraftLayout
from retrofit.artifact import folder as artifacts
from retrofit.artifact.engines import refuse_unfit
from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.runtime.plan import noise_token
from retrofit.serving.vllm.drafts import Sampling, draft
from retrofit.serving.vllm.plugin import artifact_of
from retrofit.serving.vllm.rows import DraftRows, draft_rows
from retrofit.serving.vllm.sampler import mend
from retrofit.serving.vllm.updates import applied, updates
from retrofit.serving.vllm.versions import check

logger = init_logger("vllm.retrofit")
NOISE_SEED = 0
"""Draft rows that read noise read that of this request seed, for every request."""


class Proposer:
    """Drafts for the requests of a step."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Raises RetrofitError for a vLLM, an artifact or an option that we cannot draft with."""
        check(__version__)
        place = artifact_of(vllm_config)
        if place is None:
            raise UsageError("the server does not say which artifact it serves", "start it with `retrofit serve`")
        self.artifact = artifacts.read(place)
        refuse_unfit(place, self.artifact.config, "vllm")
        self.layout = DraftLayout(**self.artifact.config["draft"])
        self.config = vllm_config
        _refuse_options(vllm_config, self.layout.block + 1)

    def load_model(self, model: Any) -> None:
        """vLLM says that the target is loaded; `attach` needs its runner too."""

    def attach(self, runner: Any) -> None:
        """Get to know the model runner, once its model is loaded.

        Raises ArtifactError for an adapter that does not fit the model, UnsupportedModelError for sliding windows.
        """
        layers = get_layers_from_vllm_config(self.config, Attention)
        if any(layer.sliding_window is not None for layer in layers.values()):
            raise UnsupportedModelError("retrofit drafts in vLLM without sliding windows, and the model has some")
        model, adapter, dtype = runner.model, self.artifact.config["adapter"], runner.dtype
        self.runner, self.device = runner, runner.device
        self.vocab = int(runner.model_config.get_vocab_size())
        self.updates = updates(
            model,
            getattr(model, "packed_modules_mapping", {}),
            self.artifact.adapter_state,
            adapter["alpha"] / adapter["rank"],
            dtype,
            self.device,
        )
        self.heads = self._heads(int(runner.model_config.get_hidden_size()))
        self.mask = self.heads.mask_vector.detach().to(dtype)
        if mend(rejection_sampler, self.device):
            logger.info("sampling: the kernel of vllm-project/vllm#55005 is wrong in this build; ours stands for it")
        logger.info("retrofit: %s drafts %d tokens a cycle", self.artifact.folder, self.layout.block + 1)

    def _heads(self, hidden: int) -> Heads:
        adapter, drafts = self.artifact.config["adapter"], self.layout.drafts
        heads = Heads(hidden, self.vocab, drafts, adapter["markov_rank"], adapter["confidence"])
        load_heads(heads, self.artifact.heads)
        return heads.requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **more: Any
    ) -> list[list[int]]:
        """Draft tokens of each request of the step, [root, d_1 .. d_K] or none.

        sampled_token_ids: what each emitted in it, nothing while its prompt is read.  num_tokens_no_spec: how many
        tokens each has, those included.
        """
        furthest = self.runner.max_model_len - self.layout.block
        live = [i for i, new in enumerate(sampled_token_ids) if new and num_tokens_no_spec[i] <= furthest]
        tokens: dict[int, list[int]] = {}
        drawn_from: list[Tensor] = []
        greedy = self.runner.input_batch.sampling_metadata.all_greedy
        for start in range(0, len(live), self._most):
            part = live[start : start + self._most]
            seeds = [sampled_token_ids[i][-1] for i in part]
            positions = [int(num_tokens_no_spec[i]) - 1 for i in part]
            tokens_NK, q_NKV = draft(
                *self._logits(part, seeds, positions), self.heads, None if greedy else self._sampling(part)
            )
            tokens |= zip(part, tokens_NK.tolist(), strict=True)
            drawn_from += [] if q_NKV is None else [q_NKV]
        if drawn_from:
            self.runner._draft_probs = torch.cat(drawn_from)
            self.runner._draft_prob_req_ids = [self.runner.input_batch.req_ids[i] for i in live]
        return [tokens.get(i, []) for i in range(len(sampled_token_ids))]

    @property
    def _most(self) -> int:
        """How many requests there may be in a draft forward: each is two to the attention, of K + 1 rows."""
        limits = self.config.scheduler_config
        return max(1, min(limits.max_num_seqs // 2, limits.max_num_batched_tokens // (self.layout.block + 1)))

    def _logits(self, part: list[int], seeds: list[int], positions: list[int]) -> tuple[Tensor, Tensor]:
        """Logits of the seeds' rows [N, V] and of the draft rows [N, K, V]."""
        runner, N, K = self.runner, len(part), self.layout.block
        [[group]] = runner.attn_groups
        blocks = runner.input_batch.block_table[0]
        table = blocks.get_device_tensor(runner.input_batch.num_reqs)[torch.tensor(part, device=self.device)]
        rows = draft_rows(torch.tensor(positions, device=self.device), table, K, blocks.block_size)
        about = self._attention(rows, max(positions) + 1 + K)
        attention = group.get_metadata_builder().build_for_drafting(about, draft_index=0)
        with (
            set_forward_context(
                dict.fromkeys(group.layer_names, attention),
                self.config,
                num_tokens=N + N * K,
                slot_mapping=dict.fromkeys(group.layer_names, rows.slots),
                skip_compiled=True,  # what is compiled reads ids, and has no updates
            ),
            applied(self.updates, first=N),
        ):
            hidden = runner.model(
                input_ids=None, positions=rows.positions, inputs_embeds=self._inputs(seeds, positions)
            )
            logits = runner.model.compute_logits(hidden)
        return logits[:N], logits[N:].view(N, K, -1)

    def _attention(self, rows: DraftRows, longest: int) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=rows.query_start,
            query_start_loc_cpu=rows.query_start.cpu(),
            seq_lens=rows.lengths,
            seq_lens_cpu_upper_bound=rows.lengths.cpu(),
            num_reqs=len(rows.lengths),
            num_actual_tokens=len(rows.positions),
            max_query_len=self.layout.block,
            max_seq_len=longest,
            block_table_tensor=rows.table_RB,
            slot_mapping=rows.slots,
            causal=self.layout.causal,
        )

    def _inputs(self, seeds: list[int], positions: list[int]) -> Tensor:
        """[N + N K, hidden]: the embeddings of the seeds, then what the draft rows read."""
        K, embed = self.layout.block, self.runner.model.embed_input_ids
        if self.layout.input == "mask":
            seen = embed(torch.tensor(seeds, device=self.device))
            return torch.cat([seen, self.mask.expand(len(seeds) * K, -1)])
        noise = [noise_token(NOISE_SEED, p + 1 + i, self.vocab) for p in positions for i in range(K)]
        found: Tensor = embed(torch.tensor(seeds + noise, device=self.device))
        return found

    def _sampling(self, part: list[int]) -> Sampling:
        """How the requests of a draft forward are sampled: as vLLM samples them, penalties and the like apart."""
        told, index = self.runner.input_batch.sampling_metadata, torch.tensor(part, device=self.device)
        top_k, top_p = (None if limit is None else limit[index] for limit in (told.top_k, told.top_p))
        return Sampling(
            told.temperature[index],
            lambda logits_NV: apply_top_k_top_p(logits_NV, top_k, top_p),
            {row: told.generators[i] for row, i in enumerate(part) if i in told.generators},
        )


def _refuse_options(config: VllmConfig, drafted: int) -> None:
    """Raise UsageError for options of vLLM that drafts of ours cannot go with."""
    parallel, wrong = config.parallel_config, []
    if parallel.world_size > 1:
        wrong.append("several GPUs for one model (--tensor-parallel-size, --pipeline-parallel-size)")
    if config.lora_config is not None:
        wrong.append("LoRA (--enable-lora)")
    if config.kv_transfer_config is not None:
        wrong.append("K/V from elsewhere (--kv-transfer-config)")
    if config.use_v2_model_runner:
        wrong.append("model runner V2 (VLLM_USE_V2_MODEL_RUNNER)")
    if wrong:
        raise UsageError(f"retrofit drafts without {', '.join(wrong)}", "leave that out")
    if config.num_speculative_tokens != drafted:
        asked = config.num_speculative_tokens
        raise UsageError(f"{asked} speculative tokens were asked for, of an artifact that drafts {drafted}")
    if config.num_lookahead_tokens != drafted:
        raise UsageError("vLLM did not load retrofit's plug-in", "put retrofit into VLLM_PLUGINS, or unset it")
