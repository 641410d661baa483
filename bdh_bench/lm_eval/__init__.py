"""Both ways between bdh-bench and EleutherAI's lm-evaluation-harness (package ``lm_eval``, version 0.4.13).

    python -m bdh_bench.lm_eval --model bdh_bench --model_args spec=bdh@quick --tasks bdh_stdlib_bpb    its command line, our models
    bdh-bench run --models bdh,gpt2 --task lm_eval:bdh_stdlib_choice                                    our command line, its tasks

This package has the name of the one that it adapts; imports are absolute, so ``lm_eval`` is always theirs.

    prefixes.py    continuations scored along a trie of contexts, every distinct token read once
    windows.py     rolling scores, also past the last position of a model that has one, where windows are asked for
    adapter.py     our models as theirs: the class that lm-eval calls
    catalogue.py   which lm-eval tasks there are, with those of ours that need no network
    documents.py   what those tasks ask, drawn from the running Python's standard library
"""
