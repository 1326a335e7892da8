"""Proof of the KV path: each pair of workers is measured over each of its paths before they serve.

`schedule` says who measures when, `end` is the process that runs where a worker will run, `measure` is one pair over
one path beside the `limits` of the same rounds, `control` starts the ends and talks to them, `facts` and `causes` find
out why a pair is slow or on another transport, `result` and `page` are the table, the JSON and the HTML page.

    python -m pdstack.transfer.qualify --local --prefill 2 --decode 2 --path auto --floor 0.5 --want shared
"""
