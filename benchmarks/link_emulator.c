/*
 * A network link between two network namespaces, in user space: rate, delay, random loss, a drop-tail queue.
 *
 *     link_emulator NAMESPACE_A NAMESPACE_B MBIT_PER_S ONE_WAY_DELAY_US LOSS QUEUE_MS
 *
 * Makes the device `emu0` in each namespace, says "ready" on standard output, and carries packets until its standard
 * input ends. LOSS is the probability that a packet of MTU size is lost on its way from A to B; nothing is lost on the
 * way back, and rate, delay and queue hold both ways. For kernels without `netem`.
 *
 * The devices take and give segments that the kernel has not cut up yet (TSO, 64 KiB at a time), since two system calls
 * for every 1500 bytes would make the emulator the slowest part of the link. What is lost, queued and delayed is
 * nevertheless decided packet by packet: a segment is cut where packets of it are missing.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define LARGEST_SEGMENT (64 * 1024 + 256)
#define QUEUE_SLOTS (1 << 16)
#define BATCH 32
/* Preamble, checksum and gap between frames, and the Ethernet header that a TUN device does not see. */
#define FRAME_OVERHEAD 38

struct parcel {
    uint64_t due_ns;
    uint32_t length;
    char *bytes; /* struct virtio_net_hdr, then an IP packet */
};

struct direction {
    int from, to;
    uint64_t loss_below; /* a random number below this loses the packet */
    uint64_t random;
    uint64_t sender_free_ns;
    struct parcel *queue;
    uint32_t head, tail;
};

static double bytes_per_ns;
static uint64_t delay_ns, queue_ns;

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ull + (uint64_t)time.tv_nsec;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int open_device(const char *namespace)
{
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int space = open(path, O_RDONLY | O_CLOEXEC);
    if (space < 0 || setns(space, CLONE_NEWNET))
        die(path);
    close(space);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (device < 0)
        die("/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    strcpy(request.ifr_name, "emu0");
    if (ioctl(device, TUNSETIFF, &request) || ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4))
        die("emu0");
    return device;
}

static uint16_t folded_sum(const void *data, size_t length, uint32_t sum)
{
    const uint8_t *bytes = data;
    for (size_t at = 0; at + 1 < length; at += 2)
        sum += (uint32_t)(bytes[at] << 8 | bytes[at + 1]);
    if (length & 1)
        sum += (uint32_t)(bytes[length - 1] << 8);
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

/* xorshift64*: good enough for losses, and the same run after run. */
static int is_lost(struct direction *way)
{
    way->random ^= way->random >> 12;
    way->random ^= way->random << 25;
    way->random ^= way->random >> 27;
    return way->loss_below && way->random * 0x2545F4914F6CDD1Dull < way->loss_below;
}

/* Whether a packet of `length` bytes that arrived at `now` gets through, and if so when its last bit has left. */
static int admit(struct direction *way, uint32_t length, uint64_t now)
{
    if (is_lost(way))
        return 0;
    if (way->sender_free_ns < now)
        way->sender_free_ns = now;
    if (way->sender_free_ns - now > queue_ns)
        return 0;
    way->sender_free_ns += (uint64_t)((length + FRAME_OVERHEAD) / bytes_per_ns);
    return 1;
}

static void enqueue(struct direction *way, char *bytes, uint32_t length)
{
    way->queue[way->head++ % QUEUE_SLOTS] = (struct parcel){way->sender_free_ns + delay_ns, length, bytes};
}

static char *copy_of(const char *bytes, size_t length)
{
    char *copy = malloc(length);
    if (!copy)
        die("malloc");
    return memcpy(copy, bytes, length);
}

/* Packets `first` to `end` (exclusive) of an uncut TCP segment, as a segment of their own. */
static void enqueue_run(struct direction *way, const char *whole, uint32_t length, uint32_t first, uint32_t end)
{
    struct virtio_net_hdr virtual;
    memcpy(&virtual, whole, sizeof virtual);
    struct iphdr ip;
    memcpy(&ip, whole + sizeof virtual, sizeof ip);
    uint32_t ip_bytes = ip.ihl * 4u;
    struct tcphdr tcp;
    memcpy(&tcp, whole + sizeof virtual + ip_bytes, sizeof tcp);
    uint32_t headers = ip_bytes + tcp.doff * 4u;
    uint32_t payload = length - (uint32_t)sizeof virtual - headers;
    uint32_t start = first * virtual.gso_size;
    uint32_t stop = end * virtual.gso_size < payload ? end * virtual.gso_size : payload;
    uint32_t packet = headers + stop - start;

    char *bytes = malloc(sizeof virtual + packet);
    if (!bytes)
        die("malloc");
    char *at_ip = bytes + sizeof virtual, *at_tcp = at_ip + ip_bytes;
    memcpy(bytes, whole, sizeof virtual + headers);
    memcpy(at_ip + headers, whole + sizeof virtual + headers + start, stop - start);
    if (stop - start <= virtual.gso_size) {
        virtual.gso_type = VIRTIO_NET_HDR_GSO_NONE;
        virtual.gso_size = 0;
    }
    memcpy(bytes, &virtual, sizeof virtual);
    ip.tot_len = htons((uint16_t)packet);
    ip.id = htons((uint16_t)(ntohs(ip.id) + first));
    ip.check = 0;
    memcpy(at_ip, &ip, sizeof ip);
    ip.check = htons((uint16_t)~folded_sum(at_ip, ip_bytes, 0));
    memcpy(at_ip, &ip, sizeof ip);
    tcp.seq = htonl(ntohl(tcp.seq) + start);
    if (stop < payload)
        tcp.fin = tcp.psh = 0;
    /* The sum over the pseudo header alone: VIRTIO_NET_HDR_F_NEEDS_CSUM says that the rest is still to be added. */
    tcp.check = htons(folded_sum(&ip.saddr, 8, (uint32_t)IPPROTO_TCP + packet - ip_bytes));
    memcpy(at_tcp, &tcp, sizeof tcp);
    if (first)
        at_tcp[13] &= 0x7f; /* CWR belongs to the first packet alone */
    enqueue(way, bytes, (uint32_t)sizeof virtual + packet);
}

static void take(struct direction *way, const char *bytes, uint32_t length, uint64_t now)
{
    const struct virtio_net_hdr *virtual = (const struct virtio_net_hdr *)bytes;
    uint32_t packet = length - (uint32_t)sizeof *virtual;
    if ((virtual->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) != VIRTIO_NET_HDR_GSO_TCPV4) {
        if (admit(way, packet, now))
            enqueue(way, copy_of(bytes, length), length);
        return;
    }
    const struct iphdr *ip = (const struct iphdr *)(bytes + sizeof *virtual);
    const struct tcphdr *tcp = (const struct tcphdr *)((const char *)ip + ip->ihl * 4);
    uint32_t headers = ip->ihl * 4u + tcp->doff * 4u, size = virtual->gso_size;
    uint32_t count = (packet - headers + size - 1) / size, first = 0;
    for (uint32_t index = 0; index < count; index++) {
        uint32_t left = packet - headers - index * size;
        if (admit(way, headers + (left < size ? left : size), now))
            continue;
        if (index > first)
            enqueue_run(way, bytes, length, first, index);
        first = index + 1;
    }
    if (first == 0)
        enqueue(way, copy_of(bytes, length), length);
    else if (first < count)
        enqueue_run(way, bytes, length, first, count);
}

static int has_room(const struct direction *way)
{
    return way->head - way->tail < QUEUE_SLOTS - 128; /* a segment can fall into 64 KiB / 536 pieces */
}

static void *carry(void *argument)
{
    struct direction *way = argument;
    char *incoming = malloc(LARGEST_SEGMENT);
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        int did = 0;
        for (int i = 0; i < BATCH && has_room(way); i++) {
            ssize_t length = read(way->from, incoming, LARGEST_SEGMENT);
            if (length <= (ssize_t)sizeof(struct virtio_net_hdr))
                break;
            take(way, incoming, (uint32_t)length, now_ns());
            did = 1;
        }
        uint64_t now = now_ns();
        for (int i = 0; i < BATCH && way->tail != way->head; i++) {
            struct parcel *parcel = &way->queue[way->tail % QUEUE_SLOTS];
            if (parcel->due_ns > now)
                break;
            if (write(way->to, parcel->bytes, parcel->length) < 0 && errno != EIO && errno != EAGAIN)
                perror("emu0");
            free(parcel->bytes);
            way->tail++;
            did = 1;
        }
        if (did)
            continue;
        struct timespec wait, *limit = NULL;
        if (way->tail != way->head) {
            uint64_t due = way->queue[way->tail % QUEUE_SLOTS].due_ns;
            uint64_t left = due > now ? due - now : 0;
            wait = (struct timespec){(time_t)(left / 1000000000u), (long)(left % 1000000000u)};
            limit = &wait;
        }
        struct pollfd readable = {way->from, has_room(way) ? POLLIN : 0, 0};
        ppoll(&readable, 1, limit, NULL);
    }
    return NULL;
}

int main(int count, char **words)
{
    if (count != 7) {
        fprintf(stderr, "link_emulator NAMESPACE_A NAMESPACE_B MBIT_PER_S ONE_WAY_DELAY_US LOSS QUEUE_MS\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, 15);
    int a = open_device(words[1]), b = open_device(words[2]);
    bytes_per_ns = atof(words[3]) / 8e3;
    delay_ns = strtoull(words[4], NULL, 10) * 1000;
    queue_ns = (uint64_t)(atof(words[6]) * 1e6);
    struct direction ways[2] = {{.from = a, .to = b, .loss_below = (uint64_t)(atof(words[5]) * 18446744073709549568.0)},
                                {.from = b, .to = a}};
    for (int i = 0; i < 2; i++) {
        pthread_t thread;
        ways[i].random = 0x9E3779B97F4A7C15ull + (uint64_t)i;
        ways[i].queue = calloc(QUEUE_SLOTS, sizeof *ways[i].queue);
        if (!ways[i].queue || pthread_create(&thread, NULL, carry, &ways[i]))
            die("a direction");
    }
    puts("ready");
    fflush(stdout);
    char byte;
    while (read(0, &byte, 1) > 0)
        continue;
    return 0;
}
