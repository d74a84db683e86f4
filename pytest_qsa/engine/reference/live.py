"""A reference that runs beside the subject, in lockstep: its forward waits at each site until the subject's is there.

Each forward of the reference runs in a greenlet below the subject's, which drives it: where the subject is at a site,
the reference goes on to the same one. So neither model's tensor is kept longer than the pair of them needs, and two
streamed models have one unit of each in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, groupby

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...captures import (
    ERROR,
    REFERENCE_SINKS,
    REFERENCE_TOKENS,
    SINKS,
    TOKENS,
    Capture,
    ChannelError,
    LocalError,
    Sinks,
    SiteKey,
    SiteNumbers,
    Statistic,
    against_reference,
    find_sinks,
    names_sinks,
    renumbered,
)
from ...common import AnomalyError, InfraError
from ..formats.format import dequantized
from ..heads import HeadInputs
from ..load.batches import rows_of
from ..modules import (
    Expert,
    Layer,
    blocks_of,
    device_of,
    evaluating,
    layers_of,
    owner_of_weight,
    with_experts,
)
from ..reduce.pairs import powers_of
from ..run.decode import run_forward
from ..run.participant import Forward, Participant, Pass, WantedSites
from ..run.rehearsal import rehearse
from ..run.run_pass import forwards_of, run_in_turn
from ..run.site_statistics import SiteStatistics, hooked
from ..stream.stream import Stream
from .experts import ExpertErrors
from .lockstep import Lockstep
from .pair_statistics import PairStatistics, ReferenceTensor

NO_SINKS = Sinks((), searched=False)


class Reference(Participant):
    """What a subject is compared with. A subclass says where the reference's tensors come from.

    `compared`: the sites at which the subject is compared, each with the statistics that need the reference.
    """

    compared: WantedSites
    pairs: PairStatistics
    compares_predictions = False
    sinks = NO_SINKS
    """The reference's sinks, where the error of a channel leaves them out."""

    def prepare(self, run: Pass, exits: ExitStack) -> None:
        """Note what is compared."""
        names = {site: against_reference(statistics) for site, statistics in run.wanted.items() if site[1] != "weight"}
        # Nothing calls the layers of packed experts: `LiveReference` runs them.
        self.compared = {site: names[site] for site in names if names[site] and site[0] in run.modules}
        self.compares_predictions = bool(against_reference(run.predictions))
        self._subject_modules = run.modules
        self._first_sample = run.first_sample

    def begin(self, exits: ExitStack) -> None:
        """Begin an attempt: nothing is compared yet."""
        self.pairs = PairStatistics(self.compared, self._subject_modules, self.sinks.among)
        self.sites = self.pairs.sites

    def visit(self, forward: Forward, site: SiteKey, call: int, tensor: Tensor, inputs: Tensor | None) -> None:
        """Compare the subject's tensor with the reference's."""
        self.pairs.compare(forward.rows, site, call, self.tensor_at(forward, site, call), tensor)

    def tensor_at(self, forward: Forward, site: SiteKey, call: int) -> ReferenceTensor | None:
        """Return what the reference has at a site, for the rows of a forward; None if it doesn't come there."""
        raise NotImplementedError

    def forward_ended(self, forward: Forward, output: object) -> None:
        """Let go of what belongs to the forward."""
        self.pairs.forget_tensors()

    def contribute(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add what was compared to the subject's own numbers."""
        self.pairs.contribute(numbers)


class LiveReference(Reference):
    """A model that runs beside the subject, in lockstep with it. `stream`: reads its weights while it runs."""

    def __init__(self, model: nn.Module, stream: Stream | None = None) -> None:
        self.model = model
        self.stream = stream
        self.modules = layers_of(model)
        self.layers = with_experts(self.modules)
        self._own: dict[SiteKey, frozenset[Statistic]] = {}
        self._refused: dict[str, str] = {}
        self.heads: HeadInputs | None = None
        """Where margins are wanted: what goes into its head."""
        self._lockstep: dict[int, Lockstep] = {}
        """The forwards that are under way, by their first sample."""
        self._current: Forward | None = None

    @property
    def device(self) -> torch.device:
        """Where its batches go."""
        return self.stream.device if self.stream is not None else device_of(self.model)

    def prepare(self, run: Pass, exits: ExitStack) -> None:
        """Find what is compared and what is wanted of the reference itself; afterwards it is as it was.

        Raises:
            AnomalyError: the reference lacks a layer that it is to be compared at.
        """
        super().prepare(run, exits)
        self._run = run
        self._check_layers(run.wanted)
        self.experts = self._experts()
        if run.wants_margins:
            self.heads = HeadInputs(self.model, stays=self.stream is None)
        self._own = self._wanted_of_itself()
        streamed = self.stream is not None
        may_stop = not self.compares_predictions
        self.statistics = SiteStatistics(self._own, self.modules, may_stop=may_stop, learns_order=not streamed)
        exits.enter_context(evaluating(self.model, use_cache=self.statistics.uses_cache))
        if self.stream is not None:
            if self._own:
                rehearse(self.model, self.statistics, run.batches[0])
            exits.enter_context(self.stream.ready())
        if run.stream is not None:
            # The subject's stream drives both models, so that each unit of the reference is loaded once for all samples
            # too.
            run.stream.run_with(self.stream, self._settle)
            exits.callback(run.stream.run_with, None, None)
        if any(map(_needs_sinks, chain.from_iterable(self.compared.values()))):
            self.sinks = self._find_sinks(run)

    def _check_layers(self, wanted: WantedSites) -> None:
        sites = (site for site, statistics in wanted.items() if against_reference(statistics))
        absent = [layer for layer, _ in sites if layer not in self.layers]
        if absent:
            raise AnomalyError(
                f"the reference has no layer {absent[0]}{f' (and {len(absent) - 1} more)' if absent[1:] else ''}: "
                "is model.reference the original of this model?"
            )

    def _wanted_of_itself(self) -> dict[SiteKey, frozenset[Statistic]]:
        """Return what is wanted of the reference alone; sites where it only meets the subject need no statistics."""
        own = {
            site: frozenset({TOKENS}) if REFERENCE_TOKENS in statistics else frozenset[Statistic]()
            for site, statistics in self.compared.items()
        }
        own = {site: frozenset[Statistic]() for site in [*self.experts.sites, *self.head_sites]} | own
        if any(REFERENCE_SINKS in statistics for statistics in self.compared.values()):
            for block in blocks_of(self.model):
                own[block, "output"] = own.get((block, "output"), frozenset()) | {TOKENS, SINKS}
        return own

    @property
    def head_sites(self) -> frozenset[SiteKey]:
        """Where its last hidden states are taken, if they are wanted."""
        site = self.heads.site if self.heads is not None else None
        return frozenset() if site is None or site[0] not in self.modules else frozenset({site})

    def begin(self, exits: ExitStack) -> None:
        """Begin an attempt, with hooks on the reference."""
        super().begin(exits)
        self.experts = self._experts()
        self.sites |= self.experts.sites
        self.statistics.begin()
        self._lockstep = {}
        exits.enter_context(hooked(self.statistics, [_Rendezvous(self)]))

    def _experts(self) -> ExpertErrors:
        wanted = {
            site: against_reference(statistics)
            for site, statistics in self._run.wanted.items()
            if site[1] == "output" and isinstance(self._run.layers[site[0]], Expert)
        }
        return ExpertErrors(wanted, self._run.layers, self.layers)

    def visit(self, forward: Forward, site: SiteKey, call: int, tensor: Tensor, inputs: Tensor | None) -> None:
        """Compare the subject's tensor with the reference's; run the experts on what the reference's get."""
        reference = self.tensor_at(forward, site, call)
        if site in self.experts.sites and reference is not None:
            self.experts.compare(forward.rows, site[0], call, reference.tensor)
        if site in self.pairs.sites:
            self.pairs.compare(forward.rows, site, call, reference, tensor)

    def contribute(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add what was compared to the subject's own numbers."""
        super().contribute(numbers)
        self.experts.contribute(numbers)

    def forward_resumed(self, forward: Forward) -> None:
        """Note which of the subject's forwards goes on."""
        self._current = forward

    def forward_started(self, forward: Forward) -> None:
        """Get the reference's forward over the same batch ready; it begins when the subject first asks."""
        # Where only weights are compared the reference has no forward to run.
        if self._own or self.compares_predictions:
            # Streamed forwards of both models are interleaved; the number of the first sample says which belong
            # together.
            first = forward.rows.samples[0]
            own = Forward(forward.batch, rows_of(forward.batch, first), forward.first)
            self._lockstep[first] = Lockstep(self, own)

    def tensor_at(self, forward: Forward, site: SiteKey, call: int) -> ReferenceTensor | None:
        """Let the reference go on to the site."""
        return self.lockstep_of(forward).tensor_at(site, call)

    def lockstep_of(self, forward: Forward) -> Lockstep:
        """Return the lockstep that a forward, of the subject or of the reference, belongs to."""
        return self._lockstep[forward.rows.samples[0]]

    def forward_ended(self, forward: Forward, output: object) -> None:
        """Let the reference come to its end; take what it returned, if predictions are compared."""
        lockstep = self._lockstep.pop(forward.rows.samples[0], None)
        if lockstep is not None:
            forward.reference_output = lockstep.finish(whole=self.compares_predictions)
            if self.heads is not None:
                forward.reference_hidden = self.heads.take(forward.rows.samples[0])
        super().forward_ended(forward, output)

    def _settle(self) -> None:
        """Let the reference come to a point where it holds little, before the subject waits for weights."""
        lockstep = self._lockstep.get(self._current.rows.samples[0]) if self._current is not None else None
        if lockstep is not None:
            lockstep.settle()

    def complete(self, capture: Capture) -> Capture:
        """Add the reference's own numbers; its samples are numbered from 0 as well."""
        own = {site: numbers for site, numbers in self.statistics.numbers().items() if self._own[site]}
        modules, blocks = tuple(self.modules), tuple(blocks_of(self.model))
        sites = renumbered(own, self._first_sample)
        reference = Capture(sites, modules=modules, blocks=blocks, refused=dict(self._refused))
        return replace(capture, reference=reference)

    def finish(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Compare the weights of both models; those of a streamed model are read for it once more."""
        run = self._run
        names = [name for (name, at), wanted in run.wanted.items() if at == "weight" and ERROR in wanted]
        # Modules are brought in once for all of their experts, which follow one another.
        for _, group in groupby(names, key=lambda name: id(owner_of_weight(run.layers[name]))):
            together = list(group)
            first, own = self.layers[together[0]], run.layers[together[0]]
            with _in_memory(first, self.stream), _in_memory(own, run.stream):
                for name in together:
                    self._compare_weights(name, numbers)

    def _compare_weights(self, name: str, numbers: dict[SiteKey, SiteNumbers]) -> None:
        try:
            theirs, ours = dequantized(self.layers[name]), dequantized(self._run.layers[name])
        except InfraError as error:
            self._refused[name] = str(error)
            return
        if theirs is None or ours is None:  # the layer owns no weight
            return
        if theirs.shape != ours.shape:
            there, here = ("×".join(map(str, tensor.shape)) for tensor in (theirs, ours))
            self._refused[name] = f"it is {here} here and {there} in the reference"
            return
        numbers[name, "weight"] = _with_error_of_weights(theirs, ours, numbers.get((name, "weight")))

    def _find_sinks(self, run: Pass) -> Sinks:
        """Run the reference alone for its sinks: a channel's error is summed up in the pass, so they come first."""
        wanted: WantedSites = {(block, "output"): frozenset({TOKENS, SINKS}) for block in blocks_of(self.model)}
        if not wanted:
            return NO_SINKS
        statistics = SiteStatistics(wanted, self.modules, may_stop=False)
        statistics.learning = False  # every block is reduced by itself, whatever the first forward shows

        def run_one(forward: Forward) -> None:
            run_forward(self.model, forward.batch, self.device, statistics)
            statistics.forward_ended(forward)

        run_all = run_in_turn if self.stream is None else self.stream.run
        with torch.no_grad(), hooked(statistics):
            for _ in run_all(forwards_of(run.batches, run.first_sample), run_one, statistics.forward_resumed):
                pass
        return find_sinks({layer: numbers for (layer, _), numbers in statistics.numbers().items()})


def _needs_sinks(statistic: Statistic) -> bool:
    return isinstance(statistic, ChannelError) and names_sinks(statistic.positions)


class _Rendezvous(Participant):
    """The reference's side of a pair: waits at each site until the subject has taken the tensor."""

    def __init__(self, reference: LiveReference) -> None:
        self._reference = reference
        self.sites = reference.sites | reference.head_sites
        self.input_sites = frozenset(
            site
            for site, statistics in reference.compared.items()
            if any(isinstance(statistic, LocalError) for statistic in statistics)
        )

    def visit(self, forward: Forward, site: SiteKey, call: int, tensor: Tensor, inputs: Tensor | None) -> None:
        """Wait for the subject."""
        if self._reference.heads is not None and site in self._reference.head_sites:
            self._reference.heads.keep(forward.rows.samples[0], tensor)
        if site not in self._reference.sites:
            return
        lockstep = self._reference.lockstep_of(forward)
        # One sample shows whether a layer mixes tokens; all of them would cost another forward.
        if inputs is not None and forward.first:
            lockstep.run_alone(site[0], inputs, tensor)
        lockstep.wait_for_subject((site, call), ReferenceTensor(tensor, inputs))


@contextmanager
def _in_memory(layer: Layer, stream: Stream | None) -> Iterator[None]:
    """Bring a layer's weight in, from disk or from where accelerate has put it."""
    module = owner_of_weight(layer)
    if stream is not None:
        stream.enter_module(module)
    with torch.no_grad(), align_module_device(module):
        yield


def _with_error_of_weights(reference: Tensor, own: Tensor, known: SiteNumbers | None) -> SiteNumbers:
    """Add the powers of each output channel's difference to the numbers of a weight."""
    matrix = own.dim() >= 2
    x, y = (tensor.flatten(1) if matrix else tensor[None] for tensor in (reference, own))
    powers = powers_of(x, y, None).cpu().numpy()
    if known is None:
        nothing = np.zeros(1, dtype=np.int32)
        dtype, lengths = str(own.dtype).removeprefix("torch."), np.array([len(y) if matrix else 0], dtype=np.int64)
        known = SiteNumbers(dtype, tuple(y.shape), matrix, frozenset(), nothing, nothing, lengths)
    return known.having({ERROR}, {"error": powers})
