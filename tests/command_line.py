"""The commands as a person types them, without a process of their own."""

from typer.testing import CliRunner


def typed(app):
    """Return a call that types arguments behind a command and expects its exit code."""

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return run
