"""What a site writes for itself, as an example: ``python -m experiments.deploy --site=configs/deploy/site.py``."""

from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.deployment.site import Budget, Site


def get_site() -> Site:
    """The site described above."""
    return Site(
        name="blood",
        data=SiteFiles(("records.jsonl",), id_column="id"),
        job="configs/deploy/quickstart.py",
        folder="site-blood",
        budget=Budget(epsilon=8.0, delta=1e-5),
        server="federation.example.org:8000",
        root_certificate="authority.pem",
        private_key="blood.key",
    )
