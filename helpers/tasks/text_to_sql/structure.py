"""Do two queries say the same, whatever they return: a second, stricter look beside execution.

sqlglot parses both; names lose their case and quotes, table aliases become table names, output aliases go, operands of AND,
OR, =, <>, + and * are put in order, `>` is turned into `<`. What is left is compared as text. It misses rewrites (a join for
an IN), so a mismatch means little and a match means much.
"""

from __future__ import annotations

import functools


def same(query: str, reference: str) -> bool | None:
    """Whether both have one canonical form; None when the reference cannot be parsed, False when only the query cannot."""
    gold = canonical(reference)
    return None if gold is None else canonical(query) == gold


@functools.lru_cache(maxsize=8192)
def canonical(query: str) -> str | None:
    """The canonical text of one query, None when sqlglot cannot parse it."""
    import logging

    import sqlglot
    from sqlglot import errors

    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    if len(query) > 20_000:
        return None
    try:
        tree = sqlglot.parse_one(query, read="sqlite")
        if tree is None:
            return None
        return _order(_plain_names(tree)).sql(dialect="sqlite", comments=False)
    except (errors.SqlglotError, RecursionError, ValueError, AttributeError, TypeError):
        return None


def _plain_names(tree):
    from sqlglot import exp

    tables = list(tree.find_all(exp.Table))
    names = [t.name.lower() for t in tables]
    real = {t.alias.lower(): t.name.lower() for t in tables if t.alias and names.count(t.name.lower()) == 1}
    single = len(tables) == 1
    for table in tables:
        if table.alias.lower() in real:
            table.set("alias", None)
    for identifier in tree.find_all(exp.Identifier):
        identifier.set("quoted", False)
        identifier.set("this", identifier.this.lower())
    for column in tree.find_all(exp.Column):
        if column.table:
            column.set("table", None if single else exp.to_identifier(real.get(column.table, column.table)))
    for select in tree.find_all(exp.Select):
        select.set(
            "expressions",
            [e.this if isinstance(e, exp.Alias) and not _used(tree, e.alias) else e for e in select.expressions],
        )
    for ordered in tree.find_all(exp.Ordered):
        ordered.set("nulls_first", None)
        if not ordered.args.get("desc"):
            ordered.set("desc", None)
    for join in tree.find_all(exp.Join):
        if (join.kind or "").upper() == "INNER":
            join.set("kind", None)
    return tree


def _used(tree, alias: str) -> bool:
    """Whether an output name is used elsewhere in the query, so that dropping it would change the query."""
    from sqlglot import exp

    return any(c.name == alias for c in tree.find_all(exp.Column) if not isinstance(c.parent, exp.Alias))


def _order(tree):
    from sqlglot import exp

    def step(node):
        if isinstance(node, exp.Paren) and not isinstance(node.this, exp.Select):
            return node.this if isinstance(node.this, (exp.Column, exp.Literal)) else node
        if isinstance(node, exp.GT):
            return exp.LT(this=node.expression, expression=node.this)
        if isinstance(node, exp.GTE):
            return exp.LTE(this=node.expression, expression=node.this)
        return node

    tree = tree.transform(step)
    nodes = [n for n in tree.walk() if isinstance(n, (exp.And, exp.Or, exp.EQ, exp.NEQ, exp.Add, exp.Mul))]
    for node in reversed(nodes):
        if isinstance(node, (exp.And, exp.Or)) and isinstance(node.parent, type(node)):
            continue  # the whole chain is sorted from its top
        parts = list(node.flatten()) if isinstance(node, (exp.And, exp.Or)) else [node.this, node.expression]
        parts = sorted((p.copy() for p in parts), key=lambda p: p.sql(dialect="sqlite"))
        if isinstance(node, (exp.And, exp.Or)):
            first, last = parts[:-1], parts[-1]
            left = first[0]
            for part in first[1:]:
                left = type(node)(this=left, expression=part)
            node.set("this", left)
            node.set("expression", last)
        else:
            node.set("this", parts[0])
            node.set("expression", parts[1])
    return tree
