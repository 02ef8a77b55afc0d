/* The least that receiving and sending cost: one system call in a loop, and nothing done with what it moves.
 *
 *   bare receive FD            takes datagrams from a socket until it is killed
 *   bare send FD MESSAGES N    sends the messages of a file, so many of them a call, and says how much CPU that took
 *
 * A message in the file is four 32-bit numbers (segment size for UDP_SEGMENT or 0, length of name, length, 0), the name
 * of its destination, and its bytes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <time.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
enum { BATCH = 256, SLOT = 65536 };

static int receive(int fd)
{
    static struct mmsghdr messages[BATCH];
    static struct iovec pieces[BATCH];
    static struct sockaddr_in6 names[BATCH];
    char *arena = mmap(NULL, (size_t)BATCH * SLOT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        return perror("mmap"), 1;
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            pieces[i] = (struct iovec){arena + (size_t)i * SLOT, SLOT};
            messages[i].msg_hdr = (struct msghdr){.msg_name = &names[i], .msg_namelen = sizeof names[i],
                                                  .msg_iov = &pieces[i], .msg_iovlen = 1};
        }
        if (recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL) < 0 && errno != EINTR)
            return perror("recvmmsg"), 1;
    }
}

struct message { uint32_t segment, name, length, unused; };

static int transmit(int fd, const char *path, int at_once)
{
    int file = open(path, O_RDONLY);
    struct stat about;
    if (file < 0 || fstat(file, &about) < 0)
        return perror(path), 1;
    char *data = mmap(NULL, about.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
    if (data == MAP_FAILED)
        return perror("mmap"), 1;
    size_t room = about.st_size / sizeof(struct message) + 1;
    struct mmsghdr *messages = calloc(room, sizeof *messages);
    struct iovec *pieces = calloc(room, sizeof *pieces);
    char (*controls)[CMSG_SPACE(sizeof(uint16_t))] = calloc(room, sizeof *controls);
    if (!messages || !pieces || !controls)
        return perror("calloc"), 1;
    int count = 0;
    for (char *at = data; at < data + about.st_size; count++) {
        struct message head;
        memcpy(&head, at, sizeof head);
        at += sizeof head;
        struct msghdr *header = &messages[count].msg_hdr;
        pieces[count] = (struct iovec){at + head.name, head.length};
        header->msg_iov = &pieces[count];
        header->msg_iovlen = 1;
        if (head.name) {
            header->msg_name = at;
            header->msg_namelen = head.name;
        }
        if (head.segment) {
            header->msg_control = controls[count];
            header->msg_controllen = sizeof controls[count];
            struct cmsghdr *control = CMSG_FIRSTHDR(header);
            control->cmsg_level = IPPROTO_UDP;
            control->cmsg_type = UDP_SEGMENT;
            control->cmsg_len = CMSG_LEN(sizeof(uint16_t));
            uint16_t segment = head.segment;
            memcpy(CMSG_DATA(control), &segment, sizeof segment);
        }
        at += head.name + head.length;
    }
    struct timespec before, after;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    for (int at = 0; at < count;) {
        int most = count - at < at_once ? count - at : at_once;
        int sent = sendmmsg(fd, messages + at, most, 0);
        if (sent < 0 && errno != EINTR)
            return perror("sendmmsg"), 1;
        at += sent > 0 ? sent : 0;
    }
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    printf("%lld\n", (after.tv_sec - before.tv_sec) * 1000000000LL + after.tv_nsec - before.tv_nsec);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "receive"))
        return receive(atoi(argv[2]));
    if (argc == 5 && !strcmp(argv[1], "send"))
        return transmit(atoi(argv[2]), argv[3], atoi(argv[4]));
    fprintf(stderr, "usage: bare receive FD | bare send FD MESSAGES N\n");
    return 64;
}
