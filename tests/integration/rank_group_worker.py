"""A Ray actor that holds a rank group, as a rollout actor does, and generates with it what a test asks for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from actors.engine.interface import FinishedRollout
from actors.engine.rank_group import EngineRankError, RankGroup
from buffer.trajectory.schema import TokenContract
from buffer.weights import WeightHandle, WeightManifest
from tests.integration.engine_worker import small_engine
from tests.integration.traffic import Request

Publication = tuple[WeightManifest, WeightHandle]


class RankGroupWorker:
    """Rank 0 of an engine of `size` ranks."""

    def __init__(self, config_json: str, contract: TokenContract, size: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(config_json)
            settings = small_engine(folder, tensor_parallel_size=size, start_timeout_s=240.0, load_format="dummy")
            self._group = RankGroup("the actor", settings, contract)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that rank 0 holds, in vLLM's names."""
        worker = self._group.engine._core.model_executor.driver_worker
        return {name: tuple(parameter.shape) for name, parameter in worker.get_model().named_parameters()}

    def load(self, publication: Publication) -> None:
        """Bring all ranks to these weights."""
        self._group.load_weights(*publication)

    def generate(
        self,
        requests: Sequence[Request],
        forced_prefixes: Mapping[str, Sequence[int]],
        abort_every: int,
        update_at: int,
        publication: Publication,
    ) -> list[FinishedRollout]:
        """Answer the requests; abort one of those under way now and then, and load new weights at a step."""
        engine, trajectories = self._group.engine, []
        for request in requests:
            engine.add(request.request_id, request.prompt_ids, request.sampling, forced_prefixes[request.request_id])
        running = [request.request_id for request in requests]
        num_steps = 0
        while engine.num_unfinished:
            finished = engine.step()
            num_steps += 1
            trajectories += finished
            running = [name for name in running if name not in {trajectory.request_id for trajectory in finished}]
            if num_steps % abort_every == 0 and running:
                trajectories += engine.abort([running.pop(0)])
            if num_steps == update_at:
                self.load(publication)
        self._group.settle()
        return trajectories

    def part(self, request: Request) -> str:
        """Take a number from rank 0's noise alone; gives how that is told."""
        self._group.engine.add(request.request_id, request.prompt_ids, request.sampling)
        try:
            while self._group.engine.num_unfinished:
                self._group.engine.step()
                torch.rand(1)
            self._group.settle()
        except EngineRankError as error:
            return str(error)
        return "nobody has noticed"
