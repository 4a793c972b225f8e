"""The packages of a wheel, which holds configs/ as nvg_jax/configs; see pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nvg_jax*"]), "nvg_jax.configs"],
    package_dir={"nvg_jax.configs": "configs"},
)
