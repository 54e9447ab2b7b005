"""The replay engine: patched forwards, computed only where a patch can change them.

Glossary, in the order in which a question passes through::

    question    two runs of one prompt (base and other), and the positions that are read    patching/runs.py
    cell        one patched forward: the base run with some states from the other run       patching/sites.py
    diverges    first position where the runs differ; before it every state is shared       patching/runs.py
    track       the rows of one cell that can differ from the base run                      packing.py
    packed      many tracks, one behind the other in one sequence; a mask separates them    packing.py
    chunk       the rows that go through a block in one call                                packing.py
    prefix      recorded keys and values of the base run that a track attends to            recorded_runs.py
    segment     one recorded piece of a prefix (base, or other where it is restored)        blocks.py
    tail        final norm, unembedding, soft-cap: from a last state to logits              blocks.py
    context     everything that all tracks of some questions share                          context.py

A patch at layer 1, position 2 of a prompt of five tokens, read at the last (R). Rows marked ``#`` are computed,
rows marked ``.`` are recorded::

    layer 3    .   .   .   .   R       only the positions that are read go through the last block
    layer 2    .   .   #   #   #       the track: positions >= 2, layers > 1
    layer 1    .   .   P   .   .       P: the patched state, taken from the other run
    layer 0    .   .   .   .   .
    position   0   1   2   3   4
               ^^^^^
               prefix: their keys and values are those of the recorded base run

Three tracks of that prompt, packed into one sequence (rows: what is asked, columns: what it may see)::

                 prefix   track a      track b   track c
    track a      yes      causal       no        no
    track b      yes      no           causal    no
    track c      yes      no           no        causal
"""
