"""What one worker holds of the model, and one pass of a micro-batch through its stage."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import nn

from engines.native.compute import Compute
from engines.native.family import Family
from engines.native.kv_store import KVStore
from engines.native.layer_source import LayerSource, ReadLayer
from engines.native.logits import shaped
from engines.native.lora import LoraModules
from engines.native.messages import RunStep, Score, Scored, StageSpec, Tops
from engines.native.paged_step import PagedStep
from engines.native.sampling import chosen_logprobs, sample
from engines.native.scoring import score, tops_of
from engines.native.shared import SharedMemory
from engines.native.weights import WeightFiles
from engines.parameters.client import ParameterClient

_IN_PLACE: Final = Compute()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameter:
    """One parameter of a layer: its module, its name there and in the checkpoint, and what it is without memory."""

    owner: nn.Module
    leaf: str
    stored: str
    absent: nn.Parameter


class HeldLayers:
    """The layers whose weights this worker has attached. Two layouts may be held at once during a handover.

    ``parameters``: asks the keeper of parameters; without it nothing stays when a layer is dropped.
    """

    def __init__(
        self,
        family: Family,
        weights: WeightFiles,
        kv: KVStore,
        names: Iterable[str],
        *,
        compute: Compute = _IN_PLACE,
        parameters: ParameterClient | None = None,
    ) -> None:
        self._compute = compute
        self._family = family
        self._weights = weights
        self._source = LayerSource(weights, parameters or ParameterClient(""))
        self._kv = kv
        self._in_checkpoint = frozenset(names)
        self._held: dict[str, ReadLayer] = {}
        self._parameters: dict[str, dict[str, _Parameter]] = {}  # by layer and name in the model

    @property
    def held(self) -> frozenset[str]:
        return frozenset(self._held)

    @property
    def weights_bytes(self) -> int:
        return sum(each.num_bytes for each in self._held.values())

    def kv_mapped_bytes(self) -> int:
        return sum(self._kv.mapped_bytes(int(layer)) for layer in self._held if layer.isdigit())

    def tensor_names(self, layer: str) -> dict[str, str]:
        """Return the checkpoint's name of each parameter of a layer, by its name in the model."""
        return {full: parameter.stored for full, parameter in self._parameters_of(layer).items()}

    def read(self, layer: str, *, keep: bool = True, cancelled: threading.Event | None = None) -> ReadLayer:
        """Return the layer's parameters where they are computed with: on the CPU, mapped from host memory or the files.

        May run beside the interpreter's main thread. With ``cancelled`` they are faulted in, until that is set.
        """
        names = self.tensor_names(layer)
        read = self._source.read(layer, names, dtypes=self._dtypes(layer), keep=keep)
        if cancelled is not None:
            self._source.populate(read, names, cancelled)
        if not self._compute.own_memory:
            return read
        copies = self._compute.weights(read.tensors)
        self._source.discard(read)  # this stage has no use for the host's memory any more
        return ReadLayer(tensors=copies, kept_as="", in_files=False)

    def _dtypes(self, layer: str) -> dict[str, torch.dtype]:
        """Return the type of each parameter of a layer, by its name in the model: some may stay as they are stored."""
        found = {}
        for full, each in self._parameters_of(layer).items():
            stored = self._weights.stored_dtype(each.stored)
            found[full] = stored if self._family.keeps(each.owner, each.leaf, stored) else self._weights.dtype
        return found

    def discard(self, read: ReadLayer) -> None:
        """Let go of a layer that was read and not attached."""
        self._source.discard(read)

    def attach(self, layer: str, read: ReadLayer) -> None:
        """Put parameters into the layer's modules; from here on it is held."""
        for full, parameter in self._parameters_of(layer).items():
            value = nn.Parameter(read.tensors[full], requires_grad=False)
            if value.shape != parameter.absent.shape:
                raise ValueError(f"{full} has shape {list(value.shape)}, not {list(parameter.absent.shape)}")
            setattr(parameter.owner, parameter.leaf, value)
        self._family.attached(layer)
        if layer.isdigit():
            self._kv.hold(int(layer))
        self._held[layer] = read

    def keep_at(self, address: str) -> None:
        """Turn to another keeper of parameters. Those that are attached it has only from ``offer`` on."""
        self._source.keep_at(address)

    def offer(self, layer: str) -> None:
        """Have the keeper keep a layer that the one before it has kept, if it is still attached."""
        if layer in self._held:
            self._held[layer] = self._source.offer(layer, self._held[layer], self.tensor_names(layer))

    def drop(self, layer: str) -> tuple[int, int]:
        """Let go of a layer's weights and KV memory; return the bytes given back of each."""
        self._family.dropping(layer)
        stored = []
        for parameter in self._parameters_of(layer).values():
            setattr(parameter.owner, parameter.leaf, parameter.absent)
            stored.append(parameter.stored)
        read = self._held.pop(layer)
        weights_bytes = read.num_bytes
        still_used = {each.stored for other in self._held for each in self._parameters_of(other).values()}
        self._weights.release(name for name in stored if name not in still_used)
        self._source.discard(read)
        return weights_bytes, self._kv.release(int(layer)) if layer.isdigit() else 0

    def _parameters_of(self, layer: str) -> dict[str, _Parameter]:
        """Return a layer's parameters. Found once, before it is first attached: a mixture has hundreds of them."""
        if layer not in self._parameters:
            self._parameters[layer] = {
                f"{prefix}.{name}": self._found(f"{prefix}.{name}", module, name)
                for prefix, module in self._family.modules(layer).items()
                for name, _ in module.named_parameters()
            }
        return self._parameters[layer]

    def _found(self, full: str, module: nn.Module, name: str) -> _Parameter:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        return _Parameter(owner=owner, leaf=leaf, stored=self._stored_name(full), absent=getattr(owner, leaf))

    def _stored_name(self, full: str) -> str:
        for name in self._family.stored_names(full):
            if name in self._in_checkpoint:
                return name
        raise KeyError(f"the checkpoint has no tensor for {full}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the stage with the head makes of a micro-batch: tokens (int32) and log-probabilities (float32) as bytes."""

    tokens: bytes = b""
    logprobs: bytes = b""
    tops: list[Tops] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


class StageRunner:
    """Runs micro-batches through the decoders of one stage."""

    def __init__(
        self,
        family: Family,
        kv: KVStore,
        *,
        shared: SharedMemory,
        kv_block_tokens: int,
        compute: Compute = _IN_PLACE,
        lora: LoraModules | None = None,
    ) -> None:
        self._compute = compute
        self._lora = lora
        self._family = family
        self._kv = kv
        self._shared = shared
        self._kv_block_tokens = kv_block_tokens

    def forward(self, spec: StageSpec, message: RunStep, hidden: torch.Tensor | None) -> tuple[torch.Tensor, PagedStep]:
        """Return the hidden states (1, tokens, hidden) after this stage's decoders."""
        step = PagedStep(
            table=self._shared.block_table,
            rows=np.frombuffer(message.rows, dtype=np.int32),
            starts=np.frombuffer(message.starts, dtype=np.int32),
            counts=np.frombuffer(message.counts, dtype=np.int32),
            kv_block_tokens=self._kv_block_tokens,
            kv=self._kv,
        )
        put = self._compute.put
        positions = put(torch.from_numpy(step.positions).long())
        if spec.is_first:
            tokens = torch.from_numpy(np.frombuffer(message.tokens, dtype=np.int32).astype(np.int64))
            hidden = self._family.embed(put(tokens[None]), positions)
        else:
            assert hidden is not None
            hidden = put(hidden).clone()  # it lies in the outbox of another worker, and decoders change it
        arguments = self._family.step_arguments(positions)
        if self._lora is not None:
            self._lora.begin(message.adapters, step.counts)
        by_modules = self._lora is not None and self._lora.is_at_work
        for index in range(spec.first_decoder, spec.end_decoder):
            hidden = self._family.run_decoder(
                index, hidden, step=step, arguments=arguments[index], by_modules=by_modules
            )
        if self._lora is not None:
            self._lora.end()
        return hidden, step

    def sample(self, message: RunStep, hidden: torch.Tensor, step: PagedStep) -> Sampled:
        """Choose the tokens that are wanted after ``hidden``, and report what else is asked for."""
        scores = [self._score(asked, hidden, step) for asked in message.scored]
        wanted = np.frombuffer(message.sampled, dtype=np.int32)
        if not len(wanted):
            return Sampled(scores=scores)
        last = self._compute.put(torch.from_numpy((step.ends[wanted] - 1).astype(np.int64)))
        logits = self._family.head(hidden[0, last])
        if not (message.shapes or message.draws or message.logprobs or message.tops):
            return Sampled(tokens=logits.argmax(dim=-1).int().cpu().numpy().tobytes(), scores=scores)
        logits = logits.cpu()
        own = {shape.row: shaped(logits[shape.row], shape, self._shared) for shape in message.shapes}
        tokens = sample(logits, message.draws, own)
        return Sampled(
            tokens=tokens.int().numpy().tobytes(),
            logprobs=chosen_logprobs(logits, tokens).float().numpy().tobytes() if message.logprobs else b"",
            tops=[tops_of(logits[top.row], top) for top in message.tops],
            scores=scores,
        )

    def _score(self, asked: Scored, hidden: torch.Tensor, step: PagedStep) -> Score:
        end, count = int(step.ends[asked.entry]), int(step.counts[asked.entry])
        wanted = hidden[0, end - count + asked.skipped : end]
        return score(lambda states: self._family.head(states).cpu(), wanted, asked)

    def warm_up(self, layer: str) -> None:
        """Run one token through a layer at KV block 0, which belongs to nobody: the first use of a layer is slower."""
        if not layer.isdigit():
            return
        one = np.zeros(1, dtype=np.int32)
        step = PagedStep(
            table=np.zeros((1, 1), dtype=np.int32),
            rows=one,
            starts=one,
            counts=np.ones(1, dtype=np.int32),
            kv_block_tokens=self._kv_block_tokens,
            kv=self._kv,
        )
        hidden = self._compute.put(torch.zeros(1, 1, self._family.hidden_size, dtype=self._family.dtype))
        index = int(layer)
        arguments = self._family.step_arguments(self._compute.put(torch.zeros(1).long()))
        self._family.run_decoder(index, hidden, step=step, arguments=arguments[index])
