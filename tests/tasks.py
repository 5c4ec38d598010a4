"""Running the tasks that yield progress and return what they found."""


def returned(task):
    """What a task returns once it has run to its end."""
    while True:
        try:
            next(task)
        except StopIteration as end:
            return end.value
