/* Exporters at a steady rate, and collectors that time what reaches them.
 *
 *   paced send RATE SECONDS FEWEST MOST TRAINS PROBES LENGTHS    sends on the connected sockets that stdin lists
 *   paced receive                                               receives on them until SIGTERM
 *
 * stdin lists descriptors, an int32 each. Every event of the sender puts FEWEST to MOST datagrams of one socket on the
 * wire at once; with TRAINS 1 as one send with UDP_SEGMENT. LENGTHS is a file of payload lengths, uint16, used in turn.
 * A payload ends in `STAMP EXPORTER NUMBER FLAG` in hexadecimal (16, 4, 8 and 1 characters): the clock just before the
 * send call, and `P` for at most PROBES datagrams a second, `.` for the others. The receiver needs to see those alone.
 *
 * The sender prints how many datagrams it sent, how many the kernel refused, how many of both were probes, and for how
 * many ns it sent. The receiver writes a record a probe when it ends: stamp, clock just after the receive call, and
 * collector, exporter, number.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
enum { SLOT = 2048, AT_ONCE = 64, MARK = 29, MOST_SOCKETS = 1024, MOST_LENGTHS = 65536, MOST_RECORDS = 1 << 22 };

static int sockets[MOST_SOCKETS];
static char payloads[AT_ONCE * SLOT];
static volatile sig_atomic_t ended;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int read_sockets(void)
{
    return fread(sockets, sizeof *sockets, MOST_SOCKETS, stdin);
}

static void hexadecimal(char *at, uint64_t value, int digits)
{
    while (digits--)
        at[digits] = "0123456789abcdef"[value & 15], value >>= 4;
}

static uint32_t draw(uint32_t *state) /* xorshift, Marsaglia 2003 */
{
    *state ^= *state << 13, *state ^= *state >> 17, *state ^= *state << 5;
    return *state;
}

static int transmit(double rate, double seconds, int fewest, int most, int trains, double probes, const char *path)
{
    static uint16_t lengths[MOST_LENGTHS];
    static uint32_t numbers[MOST_SOCKETS];
    static struct mmsghdr messages[AT_ONCE];
    static struct iovec pieces[AT_ONCE];
    FILE *file = fopen(path, "r");
    int count = read_sockets();
    size_t drawn = file ? fread(lengths, sizeof *lengths, MOST_LENGTHS, file) : 0;
    if (!count || !drawn || most > AT_ONCE || fewest < 1 || fewest > most)
        return fputs("paced: bad arguments\n", stderr), 64;
    memset(payloads, 'x', sizeof payloads);
    for (int i = 0; i < AT_ONCE; i++)
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &pieces[i], .msg_iovlen = 1};
    for (int i = 0; i < count; i++) {
        int segment = trains ? lengths[0] : 0;
        if (setsockopt(sockets[i], IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof segment) < 0)
            return perror("UDP_SEGMENT"), 1;
    }
    prctl(PR_SET_TIMERSLACK, 1ul);
    uint32_t state = 2463534242u, probe_below = probes >= rate ? UINT32_MAX : (uint32_t)(probes / rate * UINT32_MAX);
    uint64_t sent = 0, refused = 0, probed = 0, began = now(), end = began + (uint64_t)(seconds * 1e9);
    double due = began;
    for (uint64_t event = 0; due < end; event++) {
        while (now() < due) {
            struct timespec until = {(uint64_t)due / 1000000000, (uint64_t)due % 1000000000};
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        }
        int together = fewest + draw(&state) % (most - fewest + 1), exporter = event % count;
        uint64_t stamp = now();
        char *at = payloads;
        for (int i = 0; i < together; i++) {
            uint16_t length = trains ? lengths[0] : lengths[(sent + refused + i) % drawn];
            char *mark = at + length - MARK;
            hexadecimal(mark, stamp, 16);
            hexadecimal(mark + 16, exporter, 4);
            hexadecimal(mark + 20, numbers[exporter]++, 8);
            int probe = draw(&state) <= probe_below;
            mark[28] = probe ? 'P' : '.';
            probed += probe;
            pieces[i] = (struct iovec){at, length};
            at += trains ? length : SLOT;
        }
        if (trains)
            pieces[0].iov_len = (size_t)together * lengths[0];
        int goal = trains ? 1 : together;
        for (int i = 0; i < goal;) {
            int taken = goal > 1 ? sendmmsg(sockets[exporter], messages + i, goal - i, 0)
                                 : sendmsg(sockets[exporter], &messages[i].msg_hdr, 0) < 0 ? -1 : 1;
            if (taken < 0 && errno == EINTR)
                continue;
            (taken < 0 ? (refused += trains ? together : 1) : (sent += trains ? together : taken));
            i += taken < 0 ? 1 : taken;
        }
        due += together * 1e9 / rate;
    }
    printf("%llu %llu %llu %llu\n", (unsigned long long)sent, (unsigned long long)refused,
           (unsigned long long)probed, (unsigned long long)(now() - began));
    return 0;
}

struct record { uint64_t stamp, received; uint32_t collector, exporter, number, unused; };

static void end(int number)
{
    (void)number;
    ended = 1;
}

static int receive(void)
{
    static char room[65536];
    struct record *records = malloc(MOST_RECORDS * sizeof *records);
    int count = read_sockets(), poll = epoll_create1(0);
    size_t kept = 0;
    if (!records || !count || poll < 0)
        return fputs("paced: no sockets or no memory\n", stderr), 64;
    for (int i = 0; i < count; i++) {
        struct epoll_event wanted = {.events = EPOLLIN, .data.u32 = i};
        if (epoll_ctl(poll, EPOLL_CTL_ADD, sockets[i], &wanted) < 0)
            return perror("epoll_ctl"), 1;
    }
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = end}, NULL);
    puts("ready");
    fflush(stdout);
    while (!ended) {
        struct epoll_event ready[MOST_SOCKETS];
        int found = epoll_wait(poll, ready, MOST_SOCKETS, 1000);
        for (int i = 0; i < found; i++) {
            ssize_t size;
            while ((size = recv(sockets[ready[i].data.u32], room, sizeof room - 1, MSG_DONTWAIT)) >= 0) {
                uint64_t at = now();
                if (size < MARK || room[size - 1] != 'P' || kept == MOST_RECORDS)
                    continue;
                struct record *record = &records[kept];
                unsigned long long stamp;
                room[size] = 0;
                if (sscanf(room + size - MARK, "%16llx%4x%8x", &stamp, &record->exporter, &record->number) == 3)
                    record->stamp = stamp, record->received = at, record->collector = ready[i].data.u32, kept++;
            }
        }
    }
    return fwrite(records, sizeof *records, kept, stdout) != kept;
}

int main(int argc, char **argv)
{
    if (argc == 9 && !strcmp(argv[1], "send"))
        return transmit(atof(argv[2]), atof(argv[3]), atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), atof(argv[7]), argv[8]);
    if (argc == 2 && !strcmp(argv[1], "receive"))
        return receive();
    fputs("usage: paced send RATE SECONDS FEWEST MOST TRAINS PROBES LENGTHS | paced receive\n", stderr);
    return 64;
}
