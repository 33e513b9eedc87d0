"""A small hybrid learns rows that need thought over what it forgets, with one pass of sleep and with more.

python recipes/sleep.py --config recipes/sleep_rule110_cpu.yaml
"""

from hf_longctx.tasks.sleep import main


if __name__ == "__main__":
    main()
