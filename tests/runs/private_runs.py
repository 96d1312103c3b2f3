"""Made-up guarantees, in the form that runs leave them."""


def spent(epsilons, unit="record", delta=1e-5):
    """``epsilon`` of a metrics line."""
    known = [epsilon for epsilon in epsilons.values() if epsilon is not None]
    most = max(known) if len(known) == len(epsilons) else None
    return {"unit": unit, "delta": delta, "max": most, "accounts": epsilons}


def privacy(epsilons, unit="record", delta=1e-5, account=None, **changes):
    """``privacy`` of a summary; ``account`` overrides figures of every account."""
    most = spent(epsilons)["max"]
    whole = {"record": "one record", "patient": "all records of one patient", "site": "all data of one site"}[unit]
    figures = {"noise_multiplier": 1.5, "sampling_probability": 0.0625, "releases": 20, "units": 900} | (account or {})
    return {
        "mechanism": "DpFedSgd", "unit": unit, "adjacency": f"add or remove {whole}", "delta": delta, "epsilon": most,
        "accounts": {site: {"epsilon": epsilon, **figures} for site, epsilon in epsilons.items()},
        "clip_norm": 0.1, "scope": "flat", "adversary": "Whoever sees the sums.", "assumptions": ["Sums are secret."],
        "not_covered": ["Held-out figures have no noise."], "randomness": "reproducible", "warning": None,
        "budget": None, "target": None, "accountant": "PLD", "stopped": None,
        "line": f"epsilon <= {most} at delta {delta:g} for one {unit} (add or remove {whole}), the worst of "
        f"{len(epsilons)} sites",
    } | changes  # fmt: skip
