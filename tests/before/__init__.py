"""Files written by the code of commit 4d54362: what today's code must still read, and go on from.

`files/` has base models, data, run folders with one checkpoint each, and configuration files; `expected.json` has what
the code of that commit made of them. Both were made, and are made again, by

    git worktree add ../before 4d54362 && cp -r tests/before ../before/tests/
    cd ../before && python -m tests.before        # writes tests/before/files and expected.json there

with that checkout's own `dora_dist` on the path. The paths inside the files lead to PLACE, which exists only then:
whoever uses the files says where they are, as a user does who has moved a run.
"""
