"""A vLLM engine in which the model can delete its tokens.

    engine = BackspaceEngine(EngineSettings(model_dir), contract)
    engine.add("a", prompt_ids, SamplingSettings(max_new_tokens=64, max_actions=128))
    while engine.num_unfinished:
        rollouts += engine.step()

A process creates at most one engine and runs it itself. Between two calls of `step` the caller can load weights, abort
requests and compute probes. The engine seeds torch's global random generator and takes its sampling noise from it. Set
`engine_environment()` before the process imports vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from vllm import EngineArgs, SamplingParams
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason as StopReason
from vllm.v1.engine.llm_engine import LLMEngine

from actors.engine.backspace_scheduler import EXTRA_ARGS_KEY, STOP_MAX_ACTIONS, DecodingState
from actors.engine.checks import check_environment, check_fit, check_machine, check_vllm_config
from actors.engine.interface import EngineSettings, FinishedRollout, FinishReason, Float32, Int32, SamplingSettings
from actors.engine.logits_processor import IDS_WITHOUT_TOKEN
from actors.engine.weights import ExpectedTensors, load_in_place
from buffer.trajectory.schema import TokenContract

TokenIds = Sequence[int] | npt.NDArray[np.integer]

UNLOADED = -1
"""Version of weights that were never loaded (`load_format="dummy"`)."""

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "eos", "length": "max_length", "abort": "aborted"}
"""Keys: vLLM's names."""


def compile_nothing(enforce_eager: bool) -> None:
    """Switch torch's compiler off in this process; False switches it on.

    vLLM's own `enforce_eager` still compiles two helpers of sampling, for 8 s at every start, with a compiler that a
    machine may lack. TORCH_COMPILE_DISABLE would have to be set before torch is imported.
    """
    torch.compiler.set_stance("force_eager" if enforce_eager else "default")


class BackspaceEngine:
    """One engine. Not thread-safe; every method returns between two engine steps.

    contract: meaning of the ids. Backspace is never part of the model's input; `<eos>` cannot be deleted; ids without
        a token are never sampled, and no prompt may have one.

    Raises:
        ValueError: the model or the configuration of vLLM does not support deletions, or the machine lacks something.
        RuntimeError: the environment lacks what `engine_environment` asks for.
    """

    scheduler_cls: ClassVar[str] = "actors.engine.backspace_scheduler.BackspaceScheduler"
    logits_processors: ClassVar[tuple[str, ...]] = ("actors.engine.logits_processor:BackspaceLogitsProcessor",)

    def __init__(self, settings: EngineSettings, contract: TokenContract) -> None:
        check_environment()
        check_machine(settings.actors.enforce_eager)
        compile_nothing(settings.actors.enforce_eager)
        self.settings = settings
        self.contract = contract
        config = self._engine_args(settings).create_engine_config()
        # VLLM_CPU_KVCACHE_SPACE would override the setting silently.
        config.cache_config.kv_cache_memory_bytes = settings.kv_cache_bytes
        check_vllm_config(config)
        check_fit(config, settings.kv_cache_bytes)
        vocab_size = config.model_config.get_vocab_size()
        if contract.vocab_size != vocab_size:
            raise ValueError(f"the contract has {contract.vocab_size} ids, the model {vocab_size}")
        self._expected = ExpectedTensors(settings.model_dir)
        self._llm = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self._core = self._llm.engine_core.engine_core
        self._unfinished: dict[str, tuple[str, Int32]] = {}  # request id -> vLLM's id, prompt
        self._ready: list[FinishedRollout] = []  # finished inside a blocking call, returned by the next step()
        self._failure: str | None = None
        self.version: int
        """Policy version of the next action: 0 for the weights in `model_dir`, `UNLOADED` without weights."""
        self._set_version(UNLOADED if settings.load_format == "dummy" else 0)

    def _engine_args(self, settings: EngineSettings) -> EngineArgs:
        return EngineArgs(
            model=settings.model_dir,
            dtype=settings.actors.dtype,
            load_format=settings.load_format,
            trust_remote_code=False,
            seed=settings.seed,
            max_model_len=settings.max_length,
            max_num_seqs=settings.actors.max_concurrent,
            max_num_batched_tokens=settings.max_batched_tokens,
            block_size=settings.block_size,
            num_gpu_blocks_override=settings.num_kv_blocks,
            enable_prefix_caching=settings.enable_prefix_caching,
            enforce_eager=settings.actors.enforce_eager,
            async_scheduling=False,
            skip_tokenizer_init=True,
            generation_config="vllm",  # a folder's sampling defaults must not reach our requests
            distributed_executor_backend="uni",
            scheduler_cls=self.scheduler_cls,
            logits_processors=list(self.logits_processors),
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            additional_config={IDS_WITHOUT_TOKEN: self.contract.ids_without_token},
        )

    @property
    def num_unfinished(self) -> int:
        """Requests that were added and not yet returned by `step` or `abort`."""
        return len(self._unfinished) + len(self._ready)

    @property
    def dtype(self) -> str:
        """Number format that it computes in, e.g. `bfloat16`."""
        return str(self._llm.model_config.dtype).removeprefix("torch.")

    def add(
        self, request_id: str, prompt_ids: TokenIds, sampling: SamplingSettings, forced_prefix: TokenIds = ()
    ) -> None:
        """Queue a request.

        request_id: unique among the unfinished requests. prompt_ids: [P], P >= 1; the floor is its end.
        forced_prefix: ids that are forced as the first actions. The model may delete them afterwards.

        Raises:
            ValueError: ids, lengths or limits don't fit; the message says which.
            RuntimeError: no weights were loaded yet, or an earlier failure fenced this engine.
        """
        self._check_usable()
        if request_id in self._unfinished:
            raise ValueError(f"request id {request_id!r} is already in use")
        prompt = self._token_ids(prompt_ids, "prompt_ids", self.contract.backspace_id)
        forced = self._token_ids(forced_prefix, "forced_prefix", self.contract.backspace_id, *self.contract.eos_ids)
        if not 1 <= len(prompt) < self.settings.max_length:
            raise ValueError(
                f"a prompt needs 1 to {self.settings.max_length - 1} tokens, because max_length="
                f"{self.settings.max_length} counts the text too; request {request_id!r} has {len(prompt)}"
            )
        limit = min(sampling.max_new_tokens, sampling.max_actions, self.settings.max_length - len(prompt))
        if len(forced) > limit:
            raise ValueError(
                f"request {request_id!r} has a forced prefix of {len(forced)} tokens, its limits allow {limit}"
            )
        masked = () if sampling.backspace else (self.contract.backspace_id,)
        state = DecodingState(
            backspace_id=self.contract.backspace_id,
            allow_backspace=sampling.backspace,
            max_actions=sampling.max_actions,
            forced_prefix=tuple(forced.tolist()),
            always_masked=(*masked, *self.contract.eos_ids) if sampling.ban_eos else masked,
            ban_deleted=sampling.ban_deleted,
        )
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=list(self.contract.eos_ids),
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # scheduler and logits processor must see the same state
            extra_args={EXTRA_ARGS_KEY: state},
        )
        internal_id = self._llm.add_request(request_id, {"prompt_token_ids": prompt.tolist()}, params)
        self._unfinished[request_id] = internal_id, prompt

    def step(self) -> list[FinishedRollout]:
        """Run one engine step (one action for every running request) and return the requests that ended."""
        self._check_usable()
        finished, self._ready = self._ready, []
        return finished + (self._step() if self._unfinished else [])

    def abort(self, request_ids: Iterable[str]) -> list[FinishedRollout]:
        """End requests now and return their actions so far; ids that are not unfinished are ignored."""
        rollouts = []
        for request_id in request_ids:
            if request_id in self._unfinished:
                internal_id, _ = self._unfinished[request_id]
                state = self._llm.output_processor.request_states[internal_id]
                output = state.make_request_output([], None, StopReason.ABORT, None)
                rollouts.append(self._finish(request_id, output.outputs[0]))
                self._llm.abort_request([internal_id], internal=True)
        return rollouts

    def sample_next_tokens(self, prefixes: Sequence[TokenIds]) -> list[FinishedRollout]:
        """Sample one next token for each prefix, backspace excluded; gives rollouts of one action. See `complete`."""
        return self.complete(prefixes, SamplingSettings(max_new_tokens=1, max_actions=1, backspace=False))

    def complete(self, prompts: Sequence[TokenIds], sampling: SamplingSettings) -> list[FinishedRollout]:
        """Run requests to their end with the present weights; gives them in the order of their prompts.

        Other requests advance meanwhile; the next `step` returns those that ended.
        """
        names = dict.fromkeys(f"complete-{index}" for index in range(len(prompts)))
        completed: dict[str, FinishedRollout] = {}
        try:
            for name, prompt in zip(names, prompts, strict=True):
                self.add(name, prompt, sampling)
            while len(completed) < len(names):
                for rollout in self._step():
                    if rollout.request_id in names:
                        completed[rollout.request_id] = rollout
                    else:
                        self._ready.append(rollout)
        except BaseException:
            self.abort(names)
            raise
        return [completed[name] for name in names]

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights in place. Unfinished requests continue from their current text. Their key-value cache is
        computed again, so every later action comes from the new policy alone and carries `version`.

        tensors: Hugging Face name and tensor of every parameter, read during the call only. A tied pair counts as one
            and may have both names.

        Raises:
            ValueError: a tensor is missing, unknown or misshapen, or the version decreases; nothing was changed.
            RuntimeError: loading failed half-way; this engine refuses all further work.
        """
        self._check_not_fenced()
        if version < self.version:
            raise ValueError(f"weights of version {version} are older than the engine's version {self.version}")
        update = list(tensors)
        self._expected.check(update)
        self._failure = f"loading the weights of version {version} failed half-way"
        worker = self._core.model_executor.driver_worker
        load_in_place(worker.get_model(), self._llm.model_config, update)
        self._core.scheduler.reset_prefix_cache(reset_running_requests=True)
        self._failure = None
        self._set_version(version)

    def probe(self, token_ids: TokenIds) -> Float32:
        """Log-probabilities of a fixed sequence [N] under the current weights, by the engine's own kernels.

        Unfinished requests wait meanwhile: they neither advance nor lose their place, and their sampling noise does
        not change.

        Gives [N-1]: log p(token_ids[i+1] | token_ids[:i+1]) over the whole vocabulary, backspace and ids without a
        token included.
        """
        self._check_usable()
        ids = self._token_ids(token_ids, "token_ids")
        if not 2 <= len(ids) < self.settings.max_length:
            raise ValueError(f"a probe needs 2 to {self.settings.max_length - 1} tokens, this one has {len(ids)}")
        params = SamplingParams(
            temperature=0.0,  # uses no noise
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        budget = self._core.scheduler.max_num_scheduled_tokens
        with self._core.scheduler.others_throttled():
            internal_id = self._llm.add_request("probe", {"prompt_token_ids": ids.tolist()}, params)
            for _ in range(math.ceil(len(ids) / budget) + 1):
                if outputs := self._llm.step():
                    return np.asarray(outputs[0].prompt_logprobs.logprobs, dtype=np.float32)
            self._llm.abort_request([internal_id], internal=True)
        raise RuntimeError(f"the engine did not finish a probe of {len(ids)} tokens")

    def shutdown(self) -> None:
        """End the engine; unfinished requests are lost."""
        self._unfinished.clear()
        self._ready.clear()
        self._failure = "it was shut down"
        self._llm.engine_core.shutdown()
        compile_nothing(False)

    def _step(self) -> list[FinishedRollout]:
        return [self._finish(output.request_id, output.outputs[0]) for output in self._llm.step()]

    def _finish(self, request_id: str, completion: CompletionOutput) -> FinishedRollout:
        """Convert vLLM's output of a request, sampled with `logprobs=0` and `flat_logprobs=True`."""
        _, prompt_ids = self._unfinished.pop(request_id)
        reason = _FINISH_REASONS.get(completion.finish_reason)
        if reason is None:
            raise RuntimeError(f"the engine ended a request with {completion.finish_reason!r}")
        actions = np.asarray(completion.token_ids, dtype=np.int32)
        versions = np.empty(len(actions), dtype=np.int32)
        for span in completion.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        return FinishedRollout(
            request_id=request_id,
            prompt_ids=prompt_ids,
            actions=actions,
            logprobs=np.asarray(completion.logprobs.logprobs, dtype=np.float32),
            policy_version=versions,
            finish_reason="max_actions" if completion.stop_reason == STOP_MAX_ACTIONS else reason,
        )

    def _set_version(self, version: int) -> None:
        self.version = version
        self._core.set_weight_version(str(version))

    def _check_not_fenced(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"this engine takes no more work: {self._failure}")

    def _check_usable(self) -> None:
        self._check_not_fenced()
        if self.version == UNLOADED:
            raise RuntimeError(
                "this engine was started with load_format='dummy' and holds random numbers: call load_weights first"
            )

    def _token_ids(self, values: TokenIds, name: str, *forbidden: int) -> Int32:
        ids = np.asarray(values, dtype=np.int32).reshape(-1)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.contract.vocab_size:
            raise ValueError(f"{name} holds ids outside of the vocabulary of {self.contract.vocab_size}")
        for begin, end in self.contract.ids_without_token:
            if ((ids >= begin) & (ids < end)).any():
                raise ValueError(f"{name} holds an id that has no token (ids {begin} to {end - 1} have none)")
        if len(found := ids[np.isin(ids, forbidden)]):
            raise ValueError(f"{name} holds id {found[0]}, the backspace or eos action: give the text they lead to")
        return ids
