"""S3 that is patient: s3fs whose every request is tried again, braked, and sent with renewed credentials.

Invariant: a request that S3 applied and whose answer was lost ends as one that was answered, but for a
conditional creation: that ends as FileExistsError, and the storage door reads back whose object it is.
This is done at s3fs's one chokepoint, `_call_s3`: only there does an upload in parts go on where it
failed, and corpus files, suites and queries are covered with the index. Importing this module makes it
what fsspec opens for s3://.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import aiohttp
import fsspec
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import FSTimeoutError, sync_wrapper
from s3fs.core import S3FileSystem, add_retryable_error
from s3fs.errors import translate_boto_error

from pipelines.retries import Brakes, Patience, patiently, renewing
from sae_runtime.errors import one_line

_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
_PASSING = {"InternalError", "ServiceUnavailable", "RequestTimeout", "IncompleteBody", "OperationAborted",
            "ConditionalRequestConflict", "XAmzContentSHA256Mismatch", "BadDigest"}  # fmt: skip
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidClientTokenId",
            "InvalidToken", "RequestExpired", "TokenRefreshRequired"}  # fmt: skip
_PASSING_ERRORS = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.MetadataRetrievalError,
    ResponseParserError,
    ConnectionError,
    TimeoutError,
    asyncio.TimeoutError,
    FSTimeoutError,
)
_REFUSED = {404, 409, 412}  # by a server that knows us
_UNKNOWN_CAUSE = {"400", "403"}  # of answers without a body
_ABORT_SECONDS = 5.0  # an upload that is given up is tidied away if that is quick
_BULK = 1000  # objects that S3 removes by one request


class BodyError(ConnectionError):
    """An answer broke off in its body."""


add_retryable_error(BodyError)  # s3fs asks for the body again


class PatientS3(S3FileSystem):  # type: ignore[misc, unused-ignore]
    """s3fs, patient. Errors that outlast `patience` are ConnectionError or PermissionError."""

    patience: ClassVar[Patience] = Patience()
    retries = 10  # of a body that broke off, as s3fs counts them: half a minute of waits, and `patience` each
    _brakes: ClassVar[dict[str, Brakes]] = defaultdict(Brakes)  # by the server's address

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("use_listings_cache", False)  # other processes write
        super().__init__(*args, **kwargs)
        self._renewed = 0  # how often the credentials were read anew
        self._renewal = asyncio.Lock()

    def remove_objects(self, paths: Sequence[str]) -> None:
        """Remove all; those that are missing are no error."""
        for start in range(0, len(paths), _BULK):
            found = [self.split_path(path) for path in paths[start : start + _BULK]]
            keys = [{"Key": key} for _, key, _ in found]
            self.call_s3("delete_objects", Bucket=found[0][0], Delete={"Objects": keys, "Quiet": True})

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        ours = {
            "connect_timeout": self.patience.connect,
            "read_timeout": self.patience.read,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
        }
        return {**ours, **self.config_kwargs}

    async def _cat_file(
        self, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None,
        chunksize: int | None = None, max_concurrency: int | None = 1,
    ) -> bytes:  # fmt: skip
        """As s3fs has it, without asking for the size first; few objects are so large that parts pay."""
        data: bytes = await super()._cat_file(path, version_id, start, end, chunksize, max_concurrency)
        return data

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        await self.set_session()
        server = self._brakes[self._s3.meta.endpoint_url]
        brake = server.of(_part(kwargs))
        patience = self.patience
        if method == "abort_multipart_upload":
            patience = replace(patience, total=min(patience.total, _ABORT_SECONDS))
        seen = self._renewed

        async def renew() -> None:
            nonlocal seen
            async with self._renewal:
                if seen == self._renewed:  # else another request has done it
                    await self.set_session(refresh=True)
                    self._renewed += 1
            seen = self._renewed

        async def once(number: int) -> Any:
            await brake.passed(time.monotonic() + patience.total)
            sent = time.monotonic()
            try:
                answer = await self._ask(method, akwarglist, kwargs)
            except boto.ClientError as error:
                if _is_throttled(error):
                    brake.throttled(sent, patience)
                elif _status(error) in _REFUSED:
                    server.proven = True
                    brake.answered()
                if _code(error) == "NoSuchUpload":
                    if method == "abort_multipart_upload":
                        return {}
                    if method == "complete_multipart_upload" and number > 1:
                        return await self._completed(kwargs, error)
                raise
            server.proven = True
            brake.answered()
            return answer

        try:
            return await renewing(
                lambda: patiently(once, _passes, patience, server), _is_expired, renew, patience, server
            )
        except (boto.ClientError, *_PASSING_ERRORS) as error:
            raise self._told(error, kwargs, server) from error

    call_s3 = sync_wrapper(_call_s3)  # s3fs's own is bound to its own

    async def _ask(self, method: str, akwarglist: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One request. An answer that does not say what is wrong is asked for again with a body."""
        await self.set_session()
        client = await self.get_s3(kwargs.get("Bucket"))
        call = getattr(client, method)
        try:
            answer = await call(**self._get_s3_method_kwargs(call, *akwarglist, **kwargs))
        except boto.ClientError as error:
            if method == "head_object" and _code(error) in _UNKNOWN_CAUSE:
                await self._ask_why(client, kwargs)
            raise
        if method == "get_object":
            answer["Body"] = _Body(answer["Body"], _where(kwargs))
        if method == "delete_objects" and answer.get("Errors"):
            raise boto.ClientError({"Error": answer["Errors"][0]}, method)  # the first; all are asked again
        return answer

    async def _ask_why(self, client: Any, kwargs: dict[str, Any]) -> None:
        """Raise what S3 answers to a read of the first byte, if that is expired credentials."""
        try:
            found = await client.get_object(Bucket=kwargs["Bucket"], Key=kwargs["Key"], Range="bytes=0-0")
        except boto.ClientError as error:
            if _is_expired(error):
                raise
        else:
            found["Body"].close()

    async def _completed(self, kwargs: dict[str, Any], error: Exception) -> Any:
        """What an upload that is gone has made, its answer lost. Raises `error` if it has made nothing."""
        if "IfNoneMatch" in kwargs:
            raise FileExistsError(errno.EEXIST, "there may be one already", _where(kwargs)) from error
        found = await self._ask("head_object", (), {"Bucket": kwargs["Bucket"], "Key": kwargs["Key"]})
        parts = len(kwargs["MultipartUpload"]["Parts"])
        if not found["ETag"].strip('"').endswith(f"-{parts}"):
            raise error
        return found

    def _told(self, error: Exception, kwargs: dict[str, Any], server: Brakes) -> Exception:
        """An OSError that names the object and the remedy."""
        if _is_expired(error):
            text = (
                f"{_code(error)}: renew the credentials (AWS_ACCESS_KEY_ID and the others, or the shared "
                "credentials file) and run again"
            )
            return PermissionError(errno.EACCES, text, _where(kwargs))
        if _passes(error):
            waited = self.patience.total if server.proven else self.patience.unproven
            text = (
                f"{one_line(error)} (tried for {waited:g} s); see to the store or the network and run again"
            )
            return ConnectionError(errno.EIO, text, _where(kwargs))  # s3fs would go on with a TimeoutError
        told: Exception = translate_boto_error(error)
        return told


class _Body:
    """The body of an answer; what goes wrong while it is read is an OSError that names the object."""

    def __init__(self, body: Any, where: str) -> None:
        self._body, self._where = body, where

    async def read(self, *amount: int) -> bytes:
        try:
            data: bytes = await self._body.read(*amount)
            return data
        except (aiohttp.ClientError, *_PASSING_ERRORS) as error:
            text = f"{one_line(error)}; see to the store or the network and run again"
            raise BodyError(errno.EIO, text, self._where) from error

    def close(self) -> None:
        self._body.close()


def _where(kwargs: dict[str, Any]) -> str:
    """The object of a request, or the prefix of a listing."""
    return f"s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', kwargs.get('Prefix', ''))}".rstrip("/")


def _part(kwargs: dict[str, Any]) -> str:
    """Bucket and first folder of what a request is about: S3 chooses by itself which prefixes it throttles,
    and what lies in two top folders is seldom under one of them."""
    several = kwargs.get("Delete", {}).get("Objects") or [{}]
    key = str(kwargs.get("Key") or kwargs.get("Prefix") or several[0].get("Key") or "")
    return f"{kwargs.get('Bucket', '')}/{key.split('/')[0]}"


def _code(error: BaseException) -> str:
    return str(error.response["Error"].get("Code", "")) if isinstance(error, boto.ClientError) else ""


def _status(error: BaseException) -> int:
    metadata = error.response.get("ResponseMetadata", {}) if isinstance(error, boto.ClientError) else {}
    return int(metadata.get("HTTPStatusCode", 0))


def _is_throttled(error: BaseException) -> bool:
    return _code(error) in _THROTTLED or _status(error) in (429, 503)


def _is_expired(error: BaseException) -> bool:
    return _code(error) in _EXPIRED


def _passes(error: BaseException) -> bool:
    """Whether the same request may be answered another time."""
    if isinstance(error, boto.ClientError):
        status = _status(error)
        return _is_throttled(error) or _code(error) in _PASSING or (status >= 500 and status != 501)
    return isinstance(error, _PASSING_ERRORS)


for _protocol in ("s3", "s3a"):
    fsspec.register_implementation(_protocol, PatientS3, clobber=True)
