"""Train a model that learns from what it reads, on documents or on the Markov toy.

python recipes/ttt.py --config recipes/ttt_markov_toy.yaml
"""

from hf_longctx.tasks.ttt import main


if __name__ == "__main__":
    main()
