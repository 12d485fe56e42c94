"""Fetches the pages of a few sites into WARC files, which `training.prepare_text` reads.

    python -m training.crawl --start_urls https://example.org/ --contact you@example.org --output_dir data/crawl

A command that was stopped, or killed, goes on when it is given again. The spider and its manners:
`text_pipeline/spider.py`.
"""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from .command_line import parse_arguments, plain_errors


@dataclass
class CrawlArguments:
    start_urls: list[str] = field(
        default_factory=list, metadata={"help": "Pages to begin with; only their hosts are visited."}
    )
    contact: str | None = field(
        default=None,
        metadata={"help": "E-mail address or web page of whoever runs this, told to every server. Has no default."},
    )
    output_dir: str = field(default="data/crawl", metadata={"help": "The folder of the WARC files."})
    download_delay: float = field(
        default=1.0,
        metadata={"help": "Seconds between two pages of a host, at least; more where its robots.txt asks for it."},
    )
    max_depth: int = field(default=5, metadata={"help": "Links to follow from a start URL, one after the other."})
    max_pages: int = field(
        default=1000, metadata={"help": "Pages to ask for, at most, those of interrupted runs included."}
    )
    max_page_bytes: int = field(
        default=16 << 20, metadata={"help": "Bytes of a page above which it is not downloaded; 16 MiB by default."}
    )
    warc_file_bytes: int = field(
        default=1_000_000_000,
        metadata={"help": "Bytes after which a new file is begun; 1 GB, as the WARC standard recommends."},
    )

    def __post_init__(self):
        if not self.start_urls:
            raise ValueError("--start_urls is empty: give one or more pages, such as https://example.org/.")
        for url in self.start_urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"--start_urls has {url!r}: give whole addresses, such as https://example.org/.")
        if not self.contact or not ("@" in self.contact or "://" in self.contact) or not self.contact.isprintable():
            raise ValueError(
                f"--contact is {self.contact!r}: give an e-mail address or a web page at which those who run the "
                "sites can reach you."
            )
        for name, least in (("download_delay", 0), ("max_depth", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}: give {least} or more.")
        for name in ("max_pages", "max_page_bytes", "warc_file_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more.")


def main() -> None:
    with plain_errors():
        arguments, _ = parse_arguments(CrawlArguments, description=__doc__)
        # Not above: where Scrapy's zope.interface has been imported, Gradio makes no page any more.
        from .text_pipeline.spider import crawl

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
