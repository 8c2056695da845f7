#!/bin/sh
# One rank, as on another machine if $ELSEWHERE names it: it does not see the supervisor's socket, nor
# $HIDDEN.
case " $ELSEWHERE " in
*" $RANK "*)
    exec unshare --mount sh -c \
        'for one in "$TMPDIR" $HIDDEN; do mount -t tmpfs elsewhere "$one" || exit; done; exec "$@"' \
        sh "$@"
    ;;
esac
exec "$@"
