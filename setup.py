"""The packages of a wheel, which holds configs/ as nvg_jax/configs; see pyproject.toml."""

from setuptools import find_namespace_packages, setup

found = find_namespace_packages(include=["nvg_jax*", "configs*"], exclude=["*.__pycache__"])
names = {name: name.replace("configs", "nvg_jax.configs") for name in found if "configs" in name}
setup(
    packages=[names.get(name, name) for name in found],
    package_dir={package: name.replace(".", "/") for name, package in names.items()},
)
