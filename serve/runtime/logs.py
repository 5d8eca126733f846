"""The log, on stderr: lines to read, or a JSON object a line for machines."""

import json
import logging

FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """Time, level and message, and whatever fields the line has."""

    def format(self, record: logging.LogRecord) -> str:
        """One object on one line."""
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(format_: str = "text") -> None:
    """Our lines and uvicorn's; apart from the root logger, which libraries set up as they please."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if format_ == "json" else plain)
    for name, level in (("serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
