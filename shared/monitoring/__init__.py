"""The one account that every view draws on: reports, registry and health made into hops, rates, losses and a verdict.

`fanwire ledger`, `clients`, `doctor` and `top`, the console's page and its metrics show the numbers of these modules,
and none of their own.
"""
