"""A site's side of a job: it holds the text, the model and the budget, and answers what the server asks.

What it tells is this list and no more: its name; the hashes of its configuration, its model and its code's version;
numbers of records, examples, tokens and privacy units; digests of its training and test tokens and, where the unit is
the patient, of patients' names; in a round its message, bounded and blurred as the mechanism says (masked under secure
aggregation), and its mean loss, numbers of examples and tokens, and update norm (not under secure aggregation); after
the rounds, held-out figures by record id.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from fedjax_llm import __version__
from fedjax_llm.deployment.job import job_hash, load_job, ready, with_sites
from fedjax_llm.deployment.messages import REFUSED, STRANGER, Said, check_arrays, digest
from fedjax_llm.deployment.site import Site
from fedjax_llm.deployment.site_budget import SiteBudget
from fedjax_llm.deployment.site_secure import SecureSite
from fedjax_llm.deployment.talk import Exchange, Talk
from fedjax_llm.errors import UserError
from fedjax_llm.experiment import finish
from fedjax_llm.experiment.memory import make_room_for_programs
from fedjax_llm.experiment.prepare import Load, Prepared, prepare
from fedjax_llm.experiment.training_loop import Ended
from fedjax_llm.federation.apart import train_client
from fedjax_llm.federation.hosts import Hosts
from fedjax_llm.federation.joining import told
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.rounds import initial_state
from fedjax_llm.models.loading import BaseModel, load
from fedjax_llm.privacy.site_ledger import terms_of
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.types import RoundState


class Worker:
    """Answers the server's requests, one after the other.

    Args:
      site: its settings.
      load_model: gives the base model.
      console: where to show what happens.
    """

    def __init__(self, site: Site, load_model: Load = load, console: Console | None = None) -> None:
        self.site, self.job = site, load_job(site.job)
        if site.name not in self.job.data.source.names:
            raise UserError(
                f"the job {site.job} has no site {site.name!r}; it has {', '.join(self.job.data.source.names)}"
            )
        self._load, self._console = load_model, console or Console()
        self._base: BaseModel | None = None
        self._run: tuple[str, tuple[str, ...]] | None = None
        self._talk: Talk | None = None
        self._prepared: Prepared | None = None
        self._secure: SecureSite | None = None
        self._answered: tuple[str, Said] | None = None

    def answer(self, request: Said) -> Said:
        """What the site answers; a request that is repeated is answered as before."""
        known = {"hello": self._hello, "prepare": self._prepare, "train": self._train, "secure": self._masked,
                 "validate": self._evaluate, "evaluate": self._evaluate}  # fmt: skip
        about = digest(request.word, dict(request.values), list(request.arrays))
        if self._answered is not None and self._answered[0] == about:
            return self._answered[1]
        try:
            if request.word not in known:
                raise UserError(f"the server asks for {request.word!r}, which this version of the site does not know")
            said = known[request.word](request)
        except UserError as error:
            self._console.print(f"[refused] {request.word}: {error}", markup=False, highlight=False)
            said = Said(REFUSED, {"why": str(error), "kind": type(error).__name__})
        if said.word not in (STRANGER, REFUSED):
            self._answered = (about, said)
        return said

    def base(self) -> BaseModel:
        """The model, loaded once."""
        if self._base is None:
            model = self.job.model
            self._base = self._load(model.name, model.dtype, model.quantise)
        return self._base

    def _hello(self, request: Said) -> Said:
        """Whether this site and the server mean the same."""
        own = {"code": __version__, "settings": job_hash(self.job), "model": self.base().fingerprint}
        words = {
            "code": "has another version of fedjax_llm",
            "settings": f"has other settings than {self.site.job} here",
            "model": "has other weights",
        }
        for name, value in own.items():
            if request.values.get(name) != value:
                shown = f"{str(request.values.get(name))[:16]} there, {value[:16]} here"
                raise UserError(f"the server {words[name]} ({name}: {shown}); both sides need the same")
        return Said("hello", {"name": self.site.name})

    def _prepare(self, request: Said) -> Said:
        """Goes on with the preparation, as far as what all have said until now allows."""
        run, sites, log = request.values["run"], tuple(request.values["sites"]), request.values["log"]
        if self.site.name not in sites:
            raise UserError(f"the run is without site {self.site.name!r}")
        if self._talk is None or self._run != (run, sites) or len(log) < self._talk.step:
            self._give_up()
            make_room_for_programs()
            self._run, self._prepared = (run, sites), None
            place = sites.index(self.site.name)
            self._talk = Talk(lambda exchange: self._ready(run, sites, place, exchange), place + 1)
        try:
            says = self._talk.go_on(log)
        except UserError:
            self._give_up()
            raise
        if says is not None:
            return Said("says", {"data": says})
        self._prepared = self._talk.result()
        return Said("ready")

    def _give_up(self) -> None:
        """Leaves a preparation that is not gone on with."""
        if self._talk is not None:
            self._talk.end()
        self._talk = None

    def _ready(self, run: str, sites: tuple[str, ...], place: int, exchange: Exchange) -> Prepared:
        """The run as this site sees it: its own text, and numbers of the others'."""
        experiment = with_sites(self.job, sites, {self.site.name: self.site.data})
        hosts = Hosts(place + 1, len(sites) + 1, exchange, clients=(place,))
        with RunProgress(experiment.federation.rounds, self._console) as progress:
            prepared = ready(prepare(experiment, progress, lambda *_: self.base(), hosts=hosts))
        plan = prepared.plan
        assert plan is not None
        if plan.mechanism is not None and experiment.privacy.randomness == "secret":
            plan = plan._replace(secret_key=kept_key(Path(self.site.folder), run))
        if plan.secure is not None:
            self._secure = SecureSite(self.site, plan, place)
            plan = self._secure.plan
        budget = self._budget()
        if budget is not None:
            randomness = experiment.privacy.randomness
            budget.agree(run, None if plan.mechanism is None else terms_of(plan.mechanism, self.site.name, randomness))
        return replace(prepared, plan=plan)

    def _budget(self) -> SiteBudget | None:
        """The site's own."""
        own = self.site.budget
        if own is None:
            return None
        return SiteBudget(self.site.budget_path, own.epsilon, own.delta, self.site.name, own.unit)

    def _known(self, request: Said) -> Prepared | None:
        """The run that a request is about, if it is the one that this process has prepared."""
        return self._prepared if self._run is not None and request.values.get("run") == self._run[0] else None

    def _train(self, request: Said) -> Said:
        """One round's training."""
        if (prepared := self._known(request)) is None or prepared.plan is None:
            return Said(STRANGER)
        plan, number, attempt = prepared.plan, int(request.values["round"]), int(request.values["attempt"])
        if plan.secure is not None:
            raise UserError("the server asks for an update in clear, and the job has secure aggregation")
        state = received(plan, prepared, request)
        self._charge(prepared, request)
        own = train_client(plan, prepared.base.params, state, self._place, attempt)
        self._console.print(f"round {number}: trained", highlight=False)
        return Said("trained", *split_told(told(plan, own.part)))

    def _masked(self, request: Said) -> Said:
        """One stage of secure aggregation."""
        if (prepared := self._known(request)) is None or prepared.plan is None or self._secure is None:
            return Said(STRANGER)

        def train() -> Any:
            state = received(prepared.plan, prepared, self._secure.sent)
            self._charge(prepared, self._secure.sent)
            attempt = int(self._secure.sent.values["attempt"])
            return train_client(prepared.plan, prepared.base.params, state, self._place, attempt)

        return self._secure.answer(request, lambda sent: received(prepared.plan, prepared, sent), train)

    @property
    def _place(self) -> int:
        """This site's among those of the run."""
        assert self._run is not None
        return self._run[1].index(self.site.name)

    def _charge(self, prepared: Prepared, request: Said) -> None:
        """Charges the site's own budget, on the disk, before anything is computed from its records."""
        budget, plan = self._budget(), prepared.plan
        if budget is None or plan is None or plan.mechanism is None or plan.secret_key is None or self._run is None:
            return
        secret = np.asarray(jax.random.key_data(plan.secret_key)).tobytes()
        values = {name: request.values.get(name) for name in ("round", "attempt", "clip_norm")}
        facts = [values, list(request.arrays), prepared.fingerprint, job_hash(prepared.experiment)]
        computation = digest(hashlib.sha256(secret).hexdigest(), *facts)
        event = terms_of(plan.mechanism, self.site.name, prepared.experiment.privacy.randomness).event
        which = (int(request.values["round"]), int(request.values["attempt"]))
        budget.charge(*which, event, run=self._run[0], computation=computation)

    def _evaluate(self, request: Said) -> Said:
        """Held-out figures of the adapters that are sent: validation in a round, or everything at the end."""
        if (prepared := self._known(request)) is None or prepared.plan is None:
            return Said(STRANGER)
        said: list[bytes] = []

        def only_own(data: bytes) -> list[bytes]:
            said.append(data)
            return [data]

        state = received(prepared.plan, prepared, request)
        alone = replace(prepared, hosts=replace(prepared.hosts, exchange=only_own))
        with RunProgress(prepared.experiment.federation.rounds, self._console) as progress:
            if request.word == "evaluate":
                finish.follow(alone, Ended(state, None), progress)
            else:
                validate = finish.validation_of(alone, prepared.plan)
                if validate is None:
                    raise UserError("the server asks for a validation, and the job has none")
                validate(state)
        return Said("figures", {"said": said})


def sent_of(plan: RoundPlan, state: RoundState) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What the server sends of its state, as values and arrays: what clients start from, and no more.

    That is the adapters; the algorithm's state where clients are told some of it or it has moved the frozen weights;
    and the clip norm where it adapts.
    """
    leaves = list(jax.tree.leaves(state.adapters))
    if _shows_server(plan):
        leaves += jax.tree.leaves(state.server_state)
    bound = state.privacy_state.get("clip_norm")
    values = {"round": int(state.round) + 1, "clip_norm": None if bound is None else float(bound)}
    return values, [np.asarray(leaf) for leaf in leaves]


def received(plan: RoundPlan, prepared: Prepared, request: Said) -> RoundState:
    """The state that a request holds, as far as clients are sent it.

    Raises:
      UserError: its arrays are not of this run's shapes, or not finite.
    """
    state = initial_state(plan, prepared.adapters)
    leaves, structure = jax.tree.flatten(state.adapters)
    rest, server = jax.tree.flatten(state.server_state)
    if not _shows_server(plan):
        rest = []
    check_arrays(request.arrays, [*leaves, *rest], "what the server sent")
    arrays = [jnp.asarray(array) for array in request.arrays]
    privacy = dict(state.privacy_state)
    if request.values.get("clip_norm") is not None:
        privacy["clip_norm"] = jnp.float32(request.values["clip_norm"])
    return replace(
        state,
        round=jnp.int32(int(request.values["round"]) - 1),
        adapters=structure.unflatten(arrays[: len(leaves)]),
        server_state=server.unflatten(arrays[len(leaves) :]) if rest else state.server_state,
        privacy_state=privacy,
    )


def _shows_server(plan: RoundPlan) -> bool:
    """Whether clients need the state of the algorithm."""
    return plan.aggregation.broadcast is not None or plan.aggregation.residual is not None


def split_told(own: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What a site tells of its part, its message apart."""
    view = own.pop("view")
    return own | {"empty": view is None}, [] if view is None else [np.asarray(leaf) for leaf in view]


def kept_key(folder: Path, run: str) -> jax.Array:
    """The secret key of this site in a run: drawn once, and kept so that a restarted site draws the same noise."""
    path = folder / f"secret-{hashlib.sha256(run.encode()).hexdigest()[:16]}.key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".new")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(os.urandom(8))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(path.read_bytes(), "<u4")), impl="threefry2x32")


Answer = Callable[[Said], Said]
"""A site, as whoever carries messages to it sees it."""
