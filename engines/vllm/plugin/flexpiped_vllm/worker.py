"""vLLM's workers as resident ranks: layers and their KV caches come and go while steps run.

Three threads touch a worker. vLLM's own runs steps and, in the same queue, ``flexpiped_*`` calls: each stands exactly
between two steps. The side channel's prepares and releases what no step sees. The receiver's copies KV blocks into
caches that no step reads yet.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from flexpiped_served.answering import EXPECTED, RankAnswers
from flexpiped_served.failpoints import Failpoints
from flexpiped_served.finding import CannotMove
from flexpiped_served.kv import CacheForm
from flexpiped_served.moving import Moving
from flexpiped_served.side import Reply, SideChannel
from flexpiped_served.weights import WeightHelper

from flexpiped_vllm import compiled_internals, internals, refusals
from flexpiped_vllm.compiled import CompiledForward
from flexpiped_vllm.compiling import CompileFailed, CompileHelper, Model
from flexpiped_vllm.cuda_graphs import GraphedForward
from flexpiped_vllm.kv_rank import KvRank
from flexpiped_vllm.layers import LayerStore, find_layers
from flexpiped_vllm.settings import Settings
from flexpiped_vllm.starting import Starting, kept_layers

_EXPECTED = (*EXPECTED, CompileFailed)
_SWITCH_S = 0.0005  # so that a thread's bits of Python never hold a step up for long


class ResidentRank(KvRank):
    """Mixed into vLLM's worker classes. Without a refusal the rank can gain and lose layers."""

    vllm_config: Any
    model_runner: Any
    device: torch.device

    def load_model(self, **kwargs: Any) -> None:
        settings = Settings.of_environment()
        starting = Starting(self.vllm_config, settings)
        with starting.loading():
            super().load_model(**kwargs)  # type: ignore[misc]
        self._kept = starting.kept
        os.nice(max(0, settings.nice - os.nice(0)))
        sys.setswitchinterval(_SWITCH_S)
        self._busy_s = 0.0
        self._epoch = 0
        self._failpoints = Failpoints()
        self._refusal = internals.check() or refusals.of_moves(self.vllm_config)
        self._layers: LayerStore | None = None
        self._moving: Moving | None = None
        self._compiled: CompiledForward | None = None

    def determine_available_memory(self) -> int:
        available: int = super().determine_available_memory()  # type: ignore[misc]
        if not self._refusal:
            self._find_compiled()
        return available

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        self._refusal = self._refusal or refusals.of_groups(kv_cache_config)
        if self._refusal:
            return
        try:
            self._layers = LayerStore(self.model_runner, self.vllm_config, self.device)
        except CannotMove as error:
            self._refusal = str(error)
            return
        if self._compiled is not None:
            for skeleton in self._layers.absent():
                compiled_internals.choose_custom_ops(skeleton, self.vllm_config, eager=True)
        self._own_caches(self._layers)

    def compile_or_warm_up_model(self) -> Any:
        runner, pp = self.model_runner, internals.get_pp_group()
        if not pp.is_first_rank and getattr(runner, "intermediate_tensors", None) is None:
            # Eager mode on the CPU never runs the dummy step that allocates them.
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.vllm_config.model_config.dtype, device=self.device
            )
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._open()
        return times

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = super().execute_model(*args, **kwargs)  # type: ignore[misc]
        self._busy_s += time.perf_counter() - started
        return output

    # --- through vLLM's queue: between two steps ---

    def flexpiped_describe(self) -> dict[str, Any]:
        """Return what the engine core tells the daemon of this rank."""
        layers = self._layers
        return {
            "pid": os.getpid(),
            "helper_pids": self._helper_pids(),
            "pp_rank": internals.get_pp_group().rank_in_group,
            "tp_rank": internals.get_tp_group().rank_in_group,
            "layers": [] if layers is None else layers.held(),
            "num_layers": 0 if layers is None else layers.num_layers,
            "refusal": self._refusal,
            "block_bytes": 0 if self._moving is None else self._moving.block_bytes,
            "buffer_bytes": 0 if self._moving is None else self._moving.buffer_bytes,
            **self.kv_description(),
        }

    def flexpiped_copy_out(self, handover: int, ticket: int, layers: list[int], blocks: list[int]) -> None:
        """Send KV blocks of some layers, if this rank holds them. Nobody waits: the receiver acknowledges."""
        if self._moving is not None:
            core = str(Settings.of_environment().directory / "core.dgram")
            self._moving.copy_out(handover, ticket, layers, blocks, reply_to=core)

    def flexpiped_commit_copy(
        self, handover: int, participants: list[int], blocks: list[int], deadline_s: float
    ) -> dict[str, Any]:
        """Send what is left and return when it has been copied. The layers have not changed yet."""
        return self._tried(participants, lambda moving: moving.commit_copy(handover, blocks, deadline_s))

    def flexpiped_checksums(self, handover: int, participants: list[int], blocks: list[int]) -> dict[str, Any]:
        """Return checksums of these KV blocks for each layer that is to move, before the switch."""
        return self._tried(participants, lambda moving: moving.checksums(handover, blocks))

    def flexpiped_switch(self, handover: int, participants: list[int], epoch: int) -> dict[str, Any]:
        """Put gained layers into the forward pass and take lost ones out: pointers only, nothing is copied."""

        def switch(moving: Moving) -> dict[str, Any]:
            for work in getattr(self, "_pp_send_work", []):
                work.wait()
            self._pp_send_work: list[Any] = []
            self._leave_compiled()  # its code would go on with the old layers
            moving.switch(handover)
            self._epoch = epoch
            return {"epoch": epoch}

        return self._tried(participants, switch)

    def flexpiped_load_compiled(self) -> dict[str, Any]:
        """Load what was compiled for the layout in force, where this rank has fallen back."""
        compiled, layers = self._compiled, self._layers
        if compiled is None or layers is None:
            return {"load_s": 0.0}
        return self._answered(lambda: {"load_s": compiled.load(layers.held())})

    def flexpiped_use_compiled(self, use: bool) -> dict[str, Any]:
        """Run what all ranks have loaded, or drop it."""
        if self._compiled is not None:
            (self._compiled.use if use else self._compiled.drop)()
        return {}

    # --- inside ---

    def _find_compiled(self) -> None:
        try:
            _, core = find_layers(self.model_runner.get_model())
        except CannotMove as error:
            self._refusal = str(error)
            return
        self._compiled = self._compiled_forward(core)
        if self._compiled is not None:
            self._compiled.warm_eager()

    def _compiled_forward(self, core: Any) -> CompiledForward | None:
        if not compiled_internals.is_compiled(core):
            return None
        return CompiledForward(self.model_runner, core, self.vllm_config, self._failpoints)

    def _leave_compiled(self) -> None:
        if self._compiled is not None:
            self._compiled.fall_back()

    def _helper_pids(self) -> list[int]:
        pids = [0 if self._moving is None else self._moving.helper_pid]
        pids += [0 if self._compiled is None else self._compiled.helper_pid]
        return [pid for pid in pids if pid]

    def _ready_moving(self) -> Moving:
        if self._moving is None:
            raise RuntimeError(self._refusal or "the worker is still starting")
        return self._moving

    def _tried(self, participants: list[int], work: Callable[[Moving], dict[str, Any]]) -> dict[str, Any]:
        """Do a piece of a handover. An exception would reach vLLM as a failed worker, so it becomes an answer."""
        if internals.get_pp_group().rank_in_group not in participants:
            return {}
        return self._answered(lambda: work(self._ready_moving()))

    def _answered(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return work()
        except _EXPECTED as error:
            return {"error": _words(error)}

    def _own_caches(self, layers: LayerStore) -> None:
        """Give each layer a KV cache of its own, and let vLLM's one buffer go."""
        runner = self.model_runner
        old = {id(cache) for cache in runner.kv_caches}
        made = {}
        for index in layers.held():
            for name, module in layers.attention_of(index).items():
                made[name] = CacheForm.of(module.kv_cache).allocate()
                module.bind_kv_cache(made[name])
        assert len(old) == len(made), "a KV cache that belongs to no layer"
        runner.kv_caches[:] = list(made.values())

    def _open(self) -> None:
        """Begin to answer the daemon: the last thing before requests are served."""
        settings = Settings.of_environment()
        layers = self._layers
        if layers is not None and not self._refusal:
            let_go = layers.let_go if self.device.type == "cpu" else _nothing  # a fork must not touch a GPU
            model = self.model_runner.get_model()
            helper = WeightHelper(
                self._kept or kept_layers(settings, model, layers.made, self.vllm_config), let_go=let_go
            )
            if self._compiled is not None and self.device.type == "cpu":
                compiled = Model(runner=self.model_runner, core=layers.core, made=layers.made, config=self.vllm_config)
                self._compiled.set_helper(CompileHelper(compiled, let_go=let_go))
            self._moving = Moving(
                layers=layers,
                helper=helper,
                failpoints=self._failpoints,
                directory=settings.directory,
                rank=self._global_rank(),
                stage=internals.get_pp_group().rank_in_group,
                group_size=internals.get_tp_group().world_size,
                group_rank=internals.get_tp_group().rank_in_group,
                num_blocks=self.model_runner.kv_cache_config.num_blocks,
                slice_bytes=settings.slice_bytes,
            )
        self._answers = RankAnswers(
            self._failpoints, moving=self._ready_moving, status=self._status, no_grad=torch.inference_mode
        )
        self._side = SideChannel(settings.directory / f"rank-{self._global_rank()}.sock", self._answer)

    def _global_rank(self) -> int:
        pp, tp = internals.get_pp_group(), internals.get_tp_group()
        return int(pp.rank_in_group * tp.world_size + tp.rank_in_group)

    # --- the side channel's thread ---

    def _answer(self, message: dict[str, Any], reply: Reply) -> None:
        call = message.get("call")
        try:
            match message["op"]:
                case "compile":
                    ticket = 0 if self._compiled is None else self._compiled.ticket()
                    threading.Thread(target=self._compile, args=(message, ticket, reply), daemon=True).start()
                case "stop_compiling":
                    if self._compiled is not None:
                        self._compiled.stop()
                    reply({"op": "reply", "call": call, "result": {}})
                case _:
                    self._answers.answer(message, reply)
        except _EXPECTED as error:
            reply({"op": "reply", "call": call, "error": _words(error)})

    def _compile(self, message: dict[str, Any], ticket: int, reply: Reply) -> None:
        """Wait for the helper, in a thread: nothing is traced here."""
        call, compiled, layers = message["call"], self._compiled, self._layers
        result: dict[str, Any] = {}
        if compiled is not None and layers is not None:
            result = self._answered(lambda: compiled.compile(ticket, held=layers.held(), counts=message["counts"]))
        if "error" in result:
            reply({"op": "reply", "call": call, "error": result["error"]})
        else:
            reply({"op": "reply", "call": call, "result": result})

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = {
            "pid": os.getpid(),
            "pp_rank": internals.get_pp_group().rank_in_group,
            "tp_rank": internals.get_tp_group().rank_in_group,
            "busy_s": self._busy_s,
            "epoch": self._epoch,
            "runs": "" if self._compiled is None else self._compiled.state,
            "compiling_pid": 0 if self._compiled is None else self._compiled.job_pid,
        }
        return status | (self._holds() if self._moving is None else self._moving.status())

    def _holds(self) -> dict[str, Any]:
        """Return what a rank holds whose layers stay, as torch knows it: kernels may have packed some of it."""
        tensors = [cache for cache in self.model_runner.kv_caches if isinstance(cache, torch.Tensor)]
        caches = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in tensors}
        parameters = self.model_runner.get_model().parameters()
        return {
            "layers": [],
            "weights_bytes": sum(parameter.nbytes for parameter in parameters),
            "kv_mapped_bytes": sum(caches.values()),
        }


def _nothing() -> None:
    pass


def _words(error: Exception) -> str:
    """Return an error in words: those that are ours need no name."""
    return str(error) if isinstance(error, CompileFailed) else f"{type(error).__name__}: {error}"


class CPUWorker(ResidentRank, internals.VllmCPUWorker):  # type: ignore[misc]
    """A rank on CPU cores."""


class GPUWorker(ResidentRank, internals.VllmGPUWorker):  # type: ignore[misc]
    """A rank on a GPU. Not yet run on a GPU; what CUDA graphs need is in ``cuda_graphs``."""

    def _compiled_forward(self, core: Any) -> CompiledForward | None:
        if not compiled_internals.is_compiled(core) and not compiled_internals.has_cuda_graphs(self.vllm_config):
            return None
        return GraphedForward(self.model_runner, core, self.vllm_config, self._failpoints)
