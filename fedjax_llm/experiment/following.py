"""A whole run on a host other than the first: it trains and evaluates its own sites, and writes nothing."""

from rich.console import Console

from fedjax_llm.config import Experiment
from fedjax_llm.experiment.finetuning import finetune
from fedjax_llm.experiment.finish import follow as follow_finish
from fedjax_llm.experiment.finish import validation_of
from fedjax_llm.experiment.memory import set_up_process
from fedjax_llm.experiment.prepare import Load, prepare
from fedjax_llm.experiment.training_loop import follow_rounds
from fedjax_llm.federation.hosts import AGAIN, HostGone, Hosts
from fedjax_llm.models.loading import load
from fedjax_llm.runs.progress import RunProgress


def follow(experiment: Experiment, hosts: Hosts, *, console: Console, load_model: Load = load) -> int:
    """The part of a host other than the first in a run (``experiment/run.py``).

    Args:
      experiment: the same as at host 0.
      hosts: this one among all.
      console: where to show progress.
      load_model: gives the base model.

    Returns:
      0, or 130 if Ctrl-C ended it.

    Raises:
      HostGone: another host died.
      UserError: something that the user can put right.
    """
    set_up_process()
    with RunProgress(experiment.federation.rounds, console) as progress:
        progress.say(f"Host {hosts.index} of {hosts.count}: host 0 shows the run and writes it.")
        try:
            prepared, ended = prepare(experiment, progress, load_model, hosts=hosts), None
            if prepared.plan is not None:
                validate = validation_of(prepared, prepared.plan)
                ended = follow_rounds(prepared, prepared.plan, validate, progress)
                prepared, ended = finetune(prepared, ended, progress)
            follow_finish(prepared, ended, progress)
        except KeyboardInterrupt:
            progress.say("Stopped, and with this host the run.")
            return 130
        except HostGone as gone:
            raise HostGone(f"{gone}. What host 0's run folder holds is kept; {AGAIN}") from gone
    return 0
