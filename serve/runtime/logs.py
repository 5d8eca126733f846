"""The server's log on stderr: plain lines, or one JSON object a line."""

import json
import logging

FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """A formatter that writes time, level and message, or a record's own fields, as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns one JSON object on one line."""
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(log_format: str = "text") -> None:
    """Configures the loggers of this package and of uvicorn, and leaves the root logger to libraries."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else plain)
    for name, level in (("serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
