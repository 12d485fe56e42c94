"""Fetches the pages of a few sites into WARC files, which `training.prepare_text` reads.

    python -m training.crawl --start_urls https://example.org/ --contact you@example.org --output_dir data/crawl

A command that was stopped, or killed, goes on when it is given again. The spider and its manners:
`text_pipeline/spider.py`.
"""

from .command_line import parse_arguments, plain_errors
from .text_pipeline.spider import CrawlArguments, crawl


def main() -> None:
    with plain_errors():
        arguments, _ = parse_arguments(CrawlArguments, description=__doc__)
        statistics = crawl(arguments)
    counts = {
        "pages": "bounds/pages",
        "from earlier runs": "httpcache/hit",
        "forbidden by robots.txt": "robotstxt/forbidden",
        "on other hosts": "bounds/other_host",
        "no text": "bounds/no_text",
    }
    shown = ", ".join(f"{statistics.get(key, 0)} {name}" for name, key in counts.items())
    stopped = statistics.get("finish_reason") != "finished"
    print(f"{arguments.output_dir}: {shown}" + ("; stopped: the same command goes on" if stopped else ""))


if __name__ == "__main__":
    main()
