#!/bin/sh
# One rank, as on another machine if $ELSEWHERE names it: it does not see the supervisor's socket.
case " $ELSEWHERE " in
*" $RANK "*)
    exec unshare --mount sh -c 'mount -t tmpfs elsewhere "$TMPDIR" && exec "$@"' sh "$@"
    ;;
esac
exec "$@"
