"""Errors that a person can act on."""


class UserError(ValueError):
    """
    Something in the input has to be changed by the user.

    The message is one line: the offending value and the remedy. Commands print it without a traceback.
    """


class NonFiniteLossError(RuntimeError):
    """
    A loss term became NaN or infinite.

    Training stops before anything is saved, so the last checkpoint on disk is from before the term broke. The message
    names the term, the optimizer step and the ids of the examples in the batch.
    """
