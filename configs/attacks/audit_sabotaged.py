"""``configs/attacks/audit.py`` with a tenth of the noise that the accountant believes in: the audit must fail.

python -m experiments.attack --config=configs/attacks/audit_sabotaged.py   # ends with status 3
"""

from dataclasses import replace

from configs.attacks import audit
from fedjax_llm.experiment.audit_run import Audit


def get_attack() -> Audit:
    """The attack described above."""
    return replace(audit.get_attack(), noise_factor=0.1)
