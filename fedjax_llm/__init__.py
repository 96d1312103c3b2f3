"""Federated fine-tuning of large language models in JAX: many clients' adapters, one frozen base model."""

__version__ = "0.1.0"
