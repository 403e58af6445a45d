"""The sandbox's own processes: `supervisor` stays outside of the walls, `stage` builds them, `program` is within.

A bare interpreter starts these modules, so they import the standard library only, and little of it.
"""
