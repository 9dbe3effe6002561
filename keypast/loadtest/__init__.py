"""`keypast loadtest`: users as data, sent on a schedule, timed from when they were due (docs/loadtest.md).

    scenario    what one user does, as data: visits, drawn by weight; lengths, drawn from a seed
    arrival     when visits begin: so many at a time (closed), or at a rate (open: Poisson, fixed, ramp)
    plan        all that a worker process is told, as one JSON line
    clock       waits to the tenth of a millisecond, which an event loop's timers do not
    connection  HTTP/1.1 over asyncio's streams; a pool of them
    caller      one visit's calls: when each was due, was sent, had its first token, ended
    visits      what a visit of each kind does, in the words of the target
    record      samples to histograms (HDR), counters and intervals; merged by the parent
    worker      a process's share of the visits: `python -m keypast.loadtest.worker`
    check       visits again, alone: do their outputs equal those under load?
    run         the parent: workers started, their records merged, memory polled, progress told
    slo         what must hold, and how many operations were within it
    report      the result as one JSON document; table, CSV;   compare: two of them
    plots       what is drawn, as data;   svg html png: how
    search      the highest rate that holds;   ceiling: what the tester itself can do

A visit is one user's life: it opens a session (or does not), does its turns one after another, closes. Visit number i
does the same whatever the schedule, the number of workers and of connections: all it draws comes from (seed, i).
"""
