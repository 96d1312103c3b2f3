"""A private federated round of Llama 3.1 8B on sixteen TPU v5e chips: four groups of clients, each over four chips.

    python -m experiments.plan --config=configs/pod/llama3_8b.py --topology=v5e:4x4

compiles it on any machine, without a TPU, and says whether it fits. Rank 16 on q and v, 32 rows of 512 tokens at a
time, bf16 weights spread over four chips, record-level DP-SGD at the sites.
"""

from fedjax_llm.config import Data, Experiment, Model
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.mesh import MeshShape
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer


def get_config() -> Experiment:
    """The experiment described above."""
    return Experiment(
        model=Model(name="meta-llama/Llama-3.1-8B", dtype="bfloat16"),
        lora=Lora(rank=16, alpha=32, targets=("q_proj", "v_proj")),
        data=Data(max_length=512),
        training=LocalTraining(batch_size=8, local_steps=4, optimizer=Optimizer("adamw", learning_rate=1e-4)),
        federation=Federation(rounds=100, weighting="uniform"),
        privacy=Privacy(mechanism=DpSgd(clip_norm=1.0, noise_multiplier=1.0), delta=1e-6),
        execution=Execution(
            clients_per_chunk=8, tokens_per_microbatch=1024, remat="blocks", mesh=MeshShape(clients=4, fsdp=4)
        ),
    )
