"""A small, polite spider: the pages of a few sites, into WARC files.

It names itself and whom to write to, obeys robots.txt with its Crawl-delay, fetches one page of a host at a time, waits
between two (longer where a server is slow: AutoThrottle), stays on the hosts of its start URLs, and stops downloading
what turns out to be no text.
"""

import fcntl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import scrapy
from scrapy import signals
from scrapy.crawler import Crawler, CrawlerProcess
from scrapy.exceptions import IgnoreRequest, StopDownload
from scrapy.http import Headers, HtmlResponse, Response
from scrapy.linkextractors import LinkExtractor
from scrapy.robotstxt import RobotParser

from ..crawl import CrawlArguments

PRODUCT = "hf_models"  # the name that a robots.txt can give rules for
TEXT_TYPES = (b"text/", b"application/xhtml")


def crawl(arguments: CrawlArguments) -> dict[str, Any]:
    """Crawls until there is nothing left or a limit is reached; once a process, as Scrapy can.

    Returns Scrapy's statistics. What an earlier run wrote into the folder is not fetched again.
    """
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another crawl writes to {folder}: wait for it, or choose another --output_dir."
            ) from error
        process = CrawlerProcess(settings(arguments))
        crawler = process.create_crawler(SiteSpider)
        process.crawl(crawler, arguments=arguments)
        process.start()
    return crawler.stats.get_stats()


def settings(arguments: CrawlArguments) -> dict[str, Any]:
    return {
        "USER_AGENT": f"{PRODUCT} (+{arguments.contact})",
        "ROBOTSTXT_OBEY": True,
        "ROBOTSTXT_USER_AGENT": PRODUCT,
        "DOWNLOAD_DELAY": arguments.download_delay,
        "DOWNLOAD_DELAY_JITTER": 0,
        "CONCURRENT_REQUESTS_PER_DOMAIN": 1,
        "AUTOTHROTTLE_ENABLED": True,
        "AUTOTHROTTLE_START_DELAY": arguments.download_delay,
        "DEPTH_LIMIT": arguments.max_depth,
        "DOWNLOAD_MAXSIZE": arguments.max_page_bytes,
        "COOKIES_ENABLED": False,
        # The hosts before robots.txt (100) is asked for; the count behind it, and before the cache (900).
        "DOWNLOADER_MIDDLEWARES": {f"{__package__}.spider.SameHosts": 50, f"{__package__}.spider.Bounds": 850},
        "HTTPCACHE_ENABLED": True,
        "HTTPCACHE_STORAGE": f"{__package__}.warc_store.WarcStore",
        # What may be better the next time is not kept.
        "HTTPCACHE_IGNORE_HTTP_CODES": [408, 429, *range(500, 600)],
        "WARC_STORE_FOLDER": str(Path(arguments.output_dir)),
        "WARC_STORE_FILE_BYTES": arguments.warc_file_bytes,
        "TELNETCONSOLE_ENABLED": False,
        "LOG_LEVEL": "WARNING",
    }


class SiteSpider(scrapy.Spider):
    name = "site"

    def __init__(self, arguments: CrawlArguments):
        super().__init__()
        self.start_urls = arguments.start_urls
        self.hosts = {urlsplit(url).netloc for url in arguments.start_urls}
        self.max_pages = arguments.max_pages
        self.links = LinkExtractor()

    def parse(self, response: Response):
        if not isinstance(response, HtmlResponse):
            return
        for link in self.links.extract_links(response):
            if urlsplit(link.url).netloc in self.hosts and not link.nofollow:
                yield scrapy.Request(link.url)


class SameHosts:
    """Stops requests to other hosts, such as a server may redirect to."""

    def __init__(self, crawler: Crawler):
        self.crawler = crawler

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> "SameHosts":
        return cls(crawler)

    def process_request(self, request: scrapy.Request) -> None:
        if urlsplit(request.url).netloc not in self.crawler.spider.hosts:
            self.crawler.stats.inc_value("bounds/other_host")
            raise IgnoreRequest(f"{request.url} is on another host.")


class Bounds:
    """Keeps a crawl within `max_pages`, to text, and in the pace that a robots.txt asks for."""

    def __init__(self, crawler: Crawler):
        self.crawler = crawler
        self.pages = 0
        self.slow_hosts: set[str] = set()
        crawler.signals.connect(self.keep_crawl_delay, signal=signals.robots_parsed)
        crawler.signals.connect(self.stop_other_content, signal=signals.headers_received)

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> "Bounds":
        return cls(crawler)

    def process_request(self, request: scrapy.Request) -> None:
        if request.meta.get("dont_obey_robotstxt"):  # a robots.txt itself: a run asks for it anew
            request.meta["dont_cache"] = True
            return
        if "retry_times" not in request.meta:
            if self.pages >= self.crawler.spider.max_pages:
                raise IgnoreRequest("max_pages is reached.")
            self.pages += 1
            self.crawler.stats.set_value("bounds/pages", self.pages)
        if urlsplit(request.url).hostname in self.slow_hosts:
            request.meta["autothrottle_dont_adjust_delay"] = True  # it would shorten the delay

    def keep_crawl_delay(self, robotparser: RobotParser, request: scrapy.Request) -> None:
        delay = robotparser.crawl_delay(PRODUCT) or 0
        if delay <= self.crawler.settings.getfloat("DOWNLOAD_DELAY"):
            return
        downloader = self.crawler.engine.downloader
        host = downloader.get_slot_key(request)
        self.slow_hosts.add(host)
        downloader.per_slot_settings[host] = {"delay": delay, "jitter": 0}
        if host in downloader.slots:  # robots.txt came through it
            downloader.slots[host].delay = delay
            downloader.slots[host].jitter = 0

    def stop_other_content(self, headers: Headers, request: scrapy.Request) -> None:
        kind = headers.get("Content-Type", b"text/").lower()
        if not kind.startswith(TEXT_TYPES):
            self.crawler.stats.inc_value("bounds/no_text")
            raise StopDownload(fail=True)
